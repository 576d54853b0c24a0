"""Pipeline folders that bring their own code, so that diffusers alone can load them."""

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

from diffusers import DiffusionPipeline

from .json_files import write_json

_PACKAGE = __name__.rpartition(".")[0]
_REMOTE_CODE = "diffusers_modules"  # where diffusers puts the code that it loads from a pipeline's folder


def brings_its_code(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline was loaded from a self-contained folder."""
    return type(pipe).__module__.startswith(_REMOTE_CODE)


def check_code(pipe: DiffusionPipeline):
    """Raises a `ValueError` if the pipeline's class is not one whose code can be written beside the weights."""
    module = type(pipe).__module__
    if not module.startswith((f"{_PACKAGE}.", _REMOTE_CODE)):
        raise ValueError(f"`self_contained`: {type(pipe).__name__} is defined in {module}, outside {_PACKAGE}.")


def write_code(pipe: DiffusionPipeline, folder: str | os.PathLike):
    """
    Makes the folder of a saved pipeline self-contained: beside each component of ours, and in the folder itself, the
    code that it needs in one file, as diffusers expects it for `trust_remote_code=True`.

    Args:
        pipe ([`DJEPAPipeline`]): which was saved there.
        folder (`str` or `os.PathLike`): with a `model_index.json`.
    """
    folder = Path(folder)
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index["_class_name"] = ["pipeline", type(pipe).__name__]
    (folder / "pipeline.py").write_text(_code_of(type(pipe).__module__))
    for name, component in pipe.components.items():
        module = type(component).__module__
        if module.startswith((f"{_PACKAGE}.", _REMOTE_CODE)):
            file = module.rpartition(".")[2]
            (folder / name / f"{file}.py").write_text(_code_of(module))
            index[name] = [file, type(component).__name__]
    write_json(index_file, index)


def single_file_source(module: str) -> str:
    """
    A module of this package and all that it imports from the package, in one file without relative imports.

    Args:
        module (`str`): its full name.

    Raises:
        RuntimeError: if two of the modules give the same name to different things.
    """
    parts: dict[str, list[str]] = {}
    owners: dict[str, tuple[str, str]] = {}
    _collect(module, parts, owners)
    version = sys.modules[_PACKAGE].__version__
    head = f"# {_PACKAGE} {version}, the parts that {module} needs in one file. Licensed under Apache-2.0.\n"
    return "\n".join([head, *(f"# --- {name}\n\n{''.join(lines)}" for name, lines in parts.items())])


def _code_of(module: str) -> str:
    if module.startswith(_REMOTE_CODE):
        return Path(sys.modules[module].__file__).read_text()
    return single_file_source(module)


def _collect(module: str, parts: dict[str, list[str]], owners: dict[str, tuple[str, str]]):
    """Adds the source of a module, behind those that it imports."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text()
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    dropped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
            if imported not in parts and imported != module:
                _collect(imported, parts, owners)
        elif not (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"):
            continue
        dropped |= set(range(node.lineno - 1, node.end_lineno))
    for node in tree.body:
        if node.lineno - 1 in dropped or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for name in filter(None, (getattr(target, "id", getattr(target, "name", None)) for target in targets)):
            text = ast.unparse(node)
            if owners.setdefault(name, (module, text))[1] != text:
                raise RuntimeError(f"{owners[name][0]} and {module} both define {name}, each in its own way.")
    parts[module] = [line for number, line in enumerate(lines) if number not in dropped]
