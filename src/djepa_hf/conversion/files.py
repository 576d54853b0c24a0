"""Files: found on disk or on the Hub, read without running anything in them, written whole or not at all."""

import argparse
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..options import check_options

_ZIP, _PICKLE = b"PK", b"\x80"  # how PyTorch's files begin: those of today, and those from before version 1.6
_HOSTS = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf://")
_LINK = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)/(?:(?:blob|resolve|raw)/(?P<revision>[^/]+)/)?(?P<name>[^?\s]+\.\w+)(?:\?\S*)?"
)
_HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")


def find_file(path_or_link: str | os.PathLike, **hub_options) -> Path:
    """
    A local file, downloaded first where it is on the Hub.

    Args:
        path_or_link (`str` or `os.PathLike`): a path, `owner/name/file.pth`, or the file's page or address on the Hub.
        **hub_options: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`, as in
            [`~huggingface_hub.hf_hub_download`].

    Raises:
        FileNotFoundError: if it is neither here nor there.
        ValueError: if there is no such option.
    """
    check_options(hub_options, (*_HUB_OPTIONS, "weights", "dtype", "config", "vae"))
    path, text = Path(path_or_link), str(path_or_link)
    if path.is_file():
        return path
    for host in (f"{constants.ENDPOINT}/", *_HOSTS):
        text = text.removeprefix(host)
    link = _LINK.fullmatch(text)
    is_local = path.exists() or path.is_absolute() or text.startswith((".", "~")) or path.parent.is_dir()
    if link is None or is_local or link["repo"].startswith(("datasets/", "spaces/")):
        raise FileNotFoundError(f"There is no file {path_or_link}. (A file on the Hub is written owner/name/file.pth.)")
    revision = unquote(link["revision"]) if link["revision"] else hub_options.get("revision")
    try:
        return Path(hf_hub_download(link["repo"], link["name"], **{**hub_options, "revision": revision}))
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no file {path_or_link}, neither here nor on the Hub: {_first_line(error)}"
        ) from error


def read_checkpoint(path: Path) -> dict:
    """
    The content of a file that `torch.save` wrote, its tensors mapped from the file: what is not used is not read.

    No code from the file is run: of all classes a pickle may name, only tensors, plain containers and
    `argparse.Namespace` are let in.

    Args:
        path (`Path`): a local file.

    Raises:
        ValueError: if the file is damaged, not PyTorch's, or names any other class (which the message gives).
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start[:2] != _ZIP and start[:1] != _PICKLE:
        raise ValueError(f"{path} is not a checkpoint: PyTorch does not write files that begin with {start!r}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start == _ZIP)
    except OSError:
        raise
    except Exception as error:  # damaged pickles make the unpickler fail in every thinkable way
        if foreign := re.search(r"GLOBAL (\S+)|class (\S+\.\S+)", str(error)):
            raise ValueError(
                f"{path} holds a {foreign[1] or foreign[2]}, which could run code when it is read. Only tensors, plain "
                "containers and argparse.Namespace are allowed; nothing was run."
            ) from error
        raise ValueError(f"{path} is damaged or cut off: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict.")
    return content


def check_state_dict(path: Path, part: str, state_dict: dict):
    """Raises a `ValueError` unless a part of a file maps names to tensors."""
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: `{part}` holds {name!r}: {type(value).__name__}, where only tensors belong.")


def check_tensors(
    path: Path,
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    part: str | None = None,
    reason: str | None = None,
):
    """
    Raises one `ValueError` that lists every tensor that is missing, left over or of another shape.

    Args:
        path (`Path`): of the file, for the message.
        found, expected (`dict[str, torch.Tensor]`): only names and shapes matter.
        part (`str`, *optional*): where in the file the tensors are.
        reason (`str`, *optional*): what is known to be wrong, to stand in front of the list.
    """
    shapes = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    if reason or any(problems.values()):
        where = f" of `{part}`" if part else ""
        limit = 5 if reason else None  # what follows from a known reason needs no full list
        lists = [f"Tensors{where} {what}: {_listed(names, limit)}." for what, names in problems.items() if names]
        raise ValueError(" ".join([reason or f"{path} does not fit.", *lists]))


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    A place to write a folder or file to, which takes the name `path` once the block has ended well.

    An interruption or an error leaves nothing under that name.

    Args:
        path (`str` or `os.PathLike`): must not exist yet, or be an empty folder.

    Raises:
        ValueError: on entering, so before the work, if `path` exists already or its folder cannot be written to.
    """
    path = Path(os.path.abspath(path))
    try:
        is_empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir()) and path != Path.cwd()
        if os.path.lexists(path) and not is_empty_folder:
            raise ValueError(f"{path} exists already: choose another name, or remove it first.")
        path.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-unfinished-", dir=path.parent))
    except OSError as error:
        raise ValueError(f"Cannot write to {path.parent}: {error.strerror}.") from error
    try:
        unfinished = workplace / path.name
        yield unfinished
        if path.is_dir():
            path.rmdir()  # it is empty, but only a folder could take its name while it is there
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _first_line(error: Exception) -> str:
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)  # the rest of that is advice
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0]}"


def _listed(names: list[str], limit: int | None) -> str:
    more = f", and {len(names) - limit} more" if limit and len(names) > limit else ""
    return ", ".join(names[:limit]) + more
