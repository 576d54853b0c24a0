"""One evaluation from beginning to end, with everything in its result that its figures depend on."""

import inspect
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import evaluate
import torch
import torchmetrics
import transformers
from accelerate import PartialState
from diffusers import SchedulerMixin
from torch import nn

from ..json_files import write_json
from ..latent_cache import weight_hash
from ..latents import height_and_width, vae_stride
from ..pipeline_djepa import DJEPAPipeline
from ..schedulers import SOLVERS, FlowMatchTokenScheduler
from .extractors import fingerprint
from .generation import generate
from .real_images import Reference
from .scores import check_counts, score

PROTOCOL, RESULT = "protocol.json", "result.json"
# options of a call that a profile changes
PROFILED = (
    "num_inference_steps",
    "num_denoising_steps",
    "final_denoising_steps",
    "solver",
    "null_refresh_interval",
)


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
        kernel_subset_size (`int`, *optional*): images per subset of the kernel distance.
    """

    num_images: int
    sampling: dict[str, Any]
    labels: str = "balanced"
    seed: int = 0
    batch_size: int = 64
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


def check_protocol(pipe: DJEPAPipeline, protocol: Protocol):
    """Raises a `ValueError` for the first option that cannot be right; needs neither images nor an extractor."""
    image_size(pipe)
    options = {"num_images_per_label": 1, "output_type": "pil", **protocol.sampling}
    pipe.check_inputs(1, **options)
    for name in ("num_images", "batch_size"):
        if getattr(protocol, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(protocol, name)}.")


class Evaluation:
    """
    A pipeline, and what its images are measured with.

    Args:
        pipe ([`DJEPAPipeline`]): on its device; stays as it is.
        source (`str`): where the pipeline came from, for the result.
        extractor (`nn.Module`): in whose features images are compared; on the same device.
        reference ([`Reference`]): against what.
        state ([`~accelerate.PartialState`]): the processes.
    """

    def __init__(
        self, pipe: DJEPAPipeline, source: str, extractor: nn.Module, reference: Reference, state: PartialState
    ):
        self.pipe, self.source, self.extractor, self.reference, self.state = pipe, source, extractor, reference, state
        pipe.set_progress_bar_config(disable=True)
        size, channels = image_size(pipe)
        features, logits = extractor(torch.zeros(1, channels, *height_and_width(size), device=pipe.device))
        self.width, self.has_logits = features.shape[1], logits is not None
        config = pipe.transformer.config
        self.about = {
            "pipeline": source,
            "weights": config.weights,
            "weights_sha256": weight_hash(pipe.transformer),
            "vae_sha256": None if pipe.vae is None else weight_hash(pipe.vae),
            "objective": config.objective,
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "extractor": fingerprint(extractor),
        }

    def measure(
        self, folder: Path, protocol: Protocol, save_images: bool = False, title: str = "generating"
    ) -> dict | None:
        """
        Generates, measures, and writes `result.json` into a folder. Called again, it goes on where it was, and does
        nothing twice.

        Args:
            folder (`Path`): of these samples alone.
            protocol ([`Protocol`]): how.
            save_images, title: as in [`generate`].

        Returns:
            `dict`: `metrics`, `protocol` and `environment`, on the main process; nothing on the others.

        Raises:
            ValueError: before anything is generated, if options are wrong or the folder holds samples that were drawn
                with others.
        """
        check_protocol(self.pipe, protocol)
        counts = protocol.num_images, self.reference, self.width, self.has_logits, protocol.kernel_subset_size
        check_counts(*counts)
        pipe = self.pipe
        drawn, measured = self._describe(protocol)
        _check_drawn_alike(folder, drawn)
        self.state.wait_for_everyone()  # before the protocol that they check is written
        if self.state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PROTOCOL, drawn)
        earlier = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else None
        self.state.wait_for_everyone()
        is_known = earlier is not None and earlier["protocol"] == {**drawn, **measured}
        if is_known and not save_images:
            return earlier if self.state.is_main_process else None
        generated = generate(
            pipe,
            self.extractor,
            self.state,
            folder,
            num_images=protocol.num_images,
            batch_size=protocol.batch_size,
            options=protocol.sampling,
            labels=protocol.labels,
            seed=protocol.seed,
            save_images=save_images,
            title=title,
        )
        if generated is None or is_known:
            return earlier if self.state.is_main_process else None
        options = {"kernel_subset_size": protocol.kernel_subset_size, "seed": protocol.seed, "device": pipe.device}
        metrics = score(generated, self.reference, self.extractor, **options)
        result = {
            "metrics": {**metrics, "constant_images": generated.num_constant},
            "protocol": {**drawn, **measured},
            "environment": {
                "device": _device_name(pipe.device),
                "processes": self.state.num_processes,
                "images_per_second": float(f"{generated.images_per_second:.4g}"),
                "versions": {
                    module.__name__: module.__version__
                    for module in (torch, diffusers, transformers, accelerate, torchmetrics, evaluate)
                },
            },
        }
        write_json(folder / RESULT, result)
        return result

    def _describe(self, protocol: Protocol) -> tuple[dict, dict]:
        """What samples depend on, and what figures depend on besides; as JSON will give it back."""
        options = asdict(protocol)
        measured = {"kernel_subset_size": options.pop("kernel_subset_size"), "reference": self.reference.about}
        profile = options["sampling"].pop("profile", "exact")
        asked = {name: options["sampling"][name] for name in PROFILED if name in options["sampling"]}
        # what is done, whatever the profile may be in other versions
        expanded = self.pipe.expand_profile(profile, **asked)
        options["sampling"] |= {name: value for name, value in expanded.items() if value is not None}
        scheduler = self.pipe.scheduler_for(options["sampling"].pop("solver", None))
        if "temperature" not in inspect.signature(scheduler.step).parameters:
            options["sampling"]["temperature"] = None  # it has none
        config = {  # JSON has no infinity
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in scheduler.config.items()
            if not name.startswith("_")
        }
        drawn = {**self.about, **options, "profile": profile, "solver": _solver_name(scheduler), "scheduler": config}
        return tuple(json.loads(json.dumps(part, default=str)) for part in (drawn, measured))


def _check_drawn_alike(folder: Path, drawn: dict):
    path = folder / PROTOCOL
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    earlier, drawn = ({**about, **about["sampling"], "sampling": None} for about in (earlier, drawn))
    differing = [name for name in earlier | drawn if earlier.get(name) != drawn.get(name)]
    if differing:
        lists = "; ".join(f"{name} was {earlier.get(name)}, is {drawn.get(name)}" for name in differing)
        raise ValueError(
            f"{folder} holds samples that were drawn otherwise ({lists}): choose another `output_dir`, or remove it."
        )


def _solver_name(scheduler: SchedulerMixin) -> str:
    if isinstance(scheduler, FlowMatchTokenScheduler):
        return scheduler.config.solver
    names = {kind: name for name, kind in SOLVERS["diffusion"].items()}
    return names.get(type(scheduler), type(scheduler).__name__)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type
