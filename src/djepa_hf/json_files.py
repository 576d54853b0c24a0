"""JSON files that are whole or not there."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any):
    """Writes a JSON file under another name first, so that an interruption leaves what was there before."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(unfinished, path)
