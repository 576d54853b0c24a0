"""The package as a whole: what importing it costs, what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_pipeline
from PIL import Image
from test_ldm_vae import ldm_tensors

from djepa_hf.conversion import save_official_checkpoint

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


def test_readme_code_runs(tmp_path, monkeypatch):
    generate, swap_scheduler, published, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(id2label={i: str(i) for i in range(10)}).save_pretrained("outputs/digits")
    names = {}
    exec(generate, names)
    assert Image.open("seven.png").size == (128, 128)
    names["pipe"] = tiny_pipeline(objective="diffusion")
    exec(swap_scheduler, names)
    assert names["pipe"](0, num_inference_steps=2, num_denoising_steps=2).images
    save_official_checkpoint(tiny_model(sample_size=8, patch_size=1, num_channels=16, id2label=None), "djepa_base.pth")
    torch.save({"model": ldm_tensors(latents=16)}, "kl16.ckpt")
    exec(published, names)
    assert [image.size for image in names["images"]] == [(32, 32)] * 2
