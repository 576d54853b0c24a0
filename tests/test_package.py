"""The package as a whole: what importing it costs, what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_import_is_light():
    code = "import sys, djepa_hf; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "djepa_hf" in modules
    assert not {"gradio", "datasets", "evaluate", "matplotlib", "sklearn", "torchmetrics"} & set(modules)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_readme_links_lead_somewhere(path):
    assert (ROOT / path).exists()
