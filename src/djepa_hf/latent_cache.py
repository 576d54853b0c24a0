"""Latents encoded once and trained on many times: moments of the posterior, in half precision, in shards on disk."""

import hashlib
import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from diffusers import AutoencoderKL
from torch.utils.data import Dataset

from .json_files import write_json
from .seeds import seed_of

MANIFEST = "manifest.json"
VIEWS = 2  # the image and its mirror image


class CachedLatents(Dataset):
    """
    A folder that `examples/cache_latents.py` wrote, as training samples: moments `(2 * latent_channels, h, w)`.

    Args:
        folder (`str` or `Path`): of the cache.
        flip (`bool`): whether to take the mirror image half of the time, anew in each epoch.
        seed (`int`): of the flips.

    Raises:
        ValueError: if it is no cache, or not complete.
    """

    def __init__(self, folder: str | Path, flip: bool = True, seed: int = 0):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"{folder} is not a complete cache of latents: run examples/cache_latents.py (again).")
        self.manifest = json.loads((self.folder / MANIFEST).read_text())
        self.data = datasets.load_from_disk(str(self.folder)).with_format("numpy")
        self.flip, self.seed = flip, seed
        if len(self.data) != self.manifest["count"]:
            raise ValueError(f"{folder} holds {len(self.data)} images; its manifest says {self.manifest['count']}.")

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return self.data.features["label"].names

    @property
    def source(self) -> str:
        """The data that was encoded."""
        return self.manifest["source"]

    def check(self, vae: AutoencoderKL | None, resolution: int | tuple[int, int]):
        """Raises a `ValueError` that says how the cache differs from what a training run asks for."""
        if vae is None:
            raise ValueError(
                f"{self.folder} holds latents: pass `pretrained_vae_model_name_or_path`, whose they are "
                f"({self.manifest['vae']})."
            )
        wanted = {
            "resolution": resolution if isinstance(resolution, int) else list(resolution),
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.shift_factor or 0.0,
            "vae_weights": weight_hash(vae),
        }
        for name, value in wanted.items():
            if self.manifest[name] != value:
                raise ValueError(
                    f"The cache {self.folder} was made with {name} {self.manifest[name]}, this run has {value}: encode "
                    "the images again, or use what they were encoded with."
                )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        epoch, index = place
        row = self.data[index]
        view = seed_of("flip", self.seed, epoch, index) % 2 if self.flip else 0
        moments = np.asarray(row["moments"], dtype=np.float16).reshape(VIEWS, *self.manifest["shape"])[view]
        sample = torch.from_numpy(moments.copy())
        return {"sample": sample, "class_labels": int(row["label"]), "id": index, "unreadable": []}


def weight_hash(module: torch.nn.Module) -> str:
    """A fingerprint of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_features(names: list[str], shape: tuple[int, ...]) -> datasets.Features:
    """Columns of a cache of moments of a shape."""
    length = VIEWS * int(np.prod(shape))
    moments = datasets.Sequence(datasets.Value("float16"), length=length)
    return datasets.Features({"moments": moments, "label": datasets.ClassLabel(names=names)})


def write_shard(path: Path, moments: torch.Tensor, labels: list[int], features: datasets.Features):
    """
    Writes one shard of a cache, whole or not at all.

    Args:
        path (`Path`): its file.
        moments (`torch.Tensor` of shape `(n, 2, 2 * latent_channels, h, w)`): of images and mirror images.
        labels (`list[int]`): classes.
        features (`datasets.Features`): see [`cache_features`].
    """
    unfinished = path.with_suffix(".unfinished")
    rows = moments.flatten(1).to(torch.float16).cpu().numpy()
    with ArrowWriter(path=str(unfinished), features=features) as writer:
        writer.write_table(datasets.Dataset.from_dict({"moments": rows, "label": labels}, features).data.table)
        writer.finalize()
    os.replace(unfinished, path)


def write_index(folder: Path, shards: list[str], features: datasets.Features, manifest: dict):
    """Makes shards a folder that `datasets.load_from_disk` reads; the manifest comes last, and marks it complete."""
    info = datasets.DatasetInfo(features=features)
    info.write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": manifest["fingerprint"],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)
    write_json(folder / MANIFEST, manifest)
