"""One evaluation from beginning to end, with everything in its result that its figures depend on."""

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import evaluate
import torch
import torchmetrics
import transformers
from accelerate import PartialState
from torch import nn

from ..engines import start_processes
from ..json_files import write_json
from ..latent_cache import weight_hash
from ..latents import height_and_width, vae_stride
from ..pipeline_djepa import DJEPAPipeline
from ..schedulers import SOLVERS, solver_for
from .extractors import fingerprint
from .generation import generate
from .real_images import Reference
from .scores import check_counts, score

PROTOCOL, RESULT = "protocol.json", "result.json"


@dataclass
class Protocol:
    """
    How samples are drawn and measured.

    Args:
        num_images (`int`): generated images.
        sampling (`dict`): arguments of the pipeline's call.
        labels (`"balanced"` or `"random"`): classes in turn, or drawn.
        seed (`int`): of everything random.
        batch_size (`int`): images at a time; another one changes images in the last bits.
        solver (`str`, *optional*): see `SOLVERS`; the pipeline's own scheduler without it.
        kernel_subset_size (`int`, *optional*): images per subset of the kernel distance.
    """

    num_images: int
    sampling: dict[str, Any] = field(default_factory=dict)
    labels: str = "balanced"
    seed: int = 0
    batch_size: int = 64
    solver: str | None = None
    kernel_subset_size: int | None = None


def image_size(pipe: DJEPAPipeline) -> tuple[tuple[int, int] | int, int]:
    """
    Size, as [`ImageToSample`] takes it, and channels of a pipeline's images.

    Raises:
        ValueError: if what it makes are no pictures.
    """
    config = pipe.transformer.config
    channels = config.num_channels if pipe.vae is None else pipe.vae.config.out_channels
    if len(config.sample_shape) != 2 or channels not in (1, 3):
        raise ValueError(
            f"Samples with {channels} channels on a grid of rank {len(config.sample_shape)} are no pictures, which "
            "evaluation compares."
        )
    stride = 1 if pipe.vae is None else vae_stride(pipe.vae)
    height, width = (side * stride for side in height_and_width(config.sample_shape))
    return (height if height == width else (height, width)), channels


def measure(
    pipe: DJEPAPipeline,
    source: str,
    folder: Path,
    protocol: Protocol,
    extractor: nn.Module,
    reference: Reference,
    save_images: bool = False,
    state: PartialState | None = None,
    title: str = "generating",
) -> dict | None:
    """
    Generates, measures, and writes `result.json` into a folder. Called again, it goes on where it was, and measures
    nothing twice.

    Args:
        pipe ([`DJEPAPipeline`]): on its device, the extractor's, too; its scheduler stays as it is.
        source (`str`): where the pipeline came from, for the result.
        folder (`Path`): of this evaluation alone.
        protocol ([`Protocol`]): how.
        extractor (`nn.Module`), reference ([`Reference`]): in which features, and against what.
        save_images, state, title: as in [`generate`].

    Returns:
        `dict`: `metrics`, `protocol` and `environment`, on the main process; nothing on the others.

    Raises:
        ValueError: before anything is generated, if options are wrong or the folder holds samples that were drawn with
            others.
    """
    state = state or start_processes()
    config = pipe.transformer.config
    solver = protocol.solver or _solver_name(pipe)
    if protocol.solver is not None:
        pipe = DJEPAPipeline(pipe.transformer, solver_for(config.objective, solver, pipe.scheduler), pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs(1, num_images_per_label=1, output_type="pil", **protocol.sampling)
    size, channels = image_size(pipe)
    probe = torch.zeros(1, channels, *height_and_width(size), device=pipe.device)
    check_counts(protocol.num_images, reference, extractor(probe)[0].shape[1], protocol.kernel_subset_size)
    about = {
        "pipeline": source,
        "weights": config.weights,
        "weights_sha256": weight_hash(pipe.transformer),
        "objective": config.objective,
        **asdict(protocol),
        "solver": solver,
        "scheduler": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "extractor": fingerprint(extractor),
        "reference": reference.about,
    }
    about = json.loads(json.dumps(about, default=str))  # as it will be read back
    _check_protocol(folder, about)
    if (folder / RESULT).is_file():
        return json.loads((folder / RESULT).read_text())
    state.wait_for_everyone()  # before the protocol that they check is written
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PROTOCOL, about)
    state.wait_for_everyone()
    drawn = (protocol.num_images, protocol.batch_size, protocol.sampling, protocol.labels, protocol.seed)
    generated = generate(pipe, extractor, state, folder, *drawn, save_images, title)
    if generated is None:
        return None
    metrics = score(generated, reference, extractor, protocol.kernel_subset_size, protocol.seed)
    result = {
        "metrics": {**metrics, "constant_images": generated.num_constant},
        "protocol": about,
        "environment": {
            "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else platform.processor() or "cpu",
            "processes": state.num_processes,
            "images_per_second": round(generated.images_per_second, 3),
            "versions": {
                module.__name__: module.__version__
                for module in (torch, diffusers, transformers, accelerate, torchmetrics, evaluate)
            },
        },
    }
    write_json(folder / RESULT, result)
    return result


def _check_protocol(folder: Path, about: dict):
    path = folder / PROTOCOL
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    differing = [name for name in about if earlier.get(name) != about[name]]
    if differing:
        lists = "; ".join(f"{name} was {earlier.get(name)}, is {about[name]}" for name in differing)
        raise ValueError(
            f"{folder} holds samples that were drawn otherwise ({lists}): choose another `output_dir`, or remove it."
        )


def _solver_name(pipe: DJEPAPipeline) -> str:
    if pipe.transformer.config.objective == "flow_matching":
        return pipe.scheduler.config.solver
    names = {kind: name for name, kind in SOLVERS[pipe.transformer.config.objective].items()}
    return names.get(type(pipe.scheduler), type(pipe.scheduler).__name__)
