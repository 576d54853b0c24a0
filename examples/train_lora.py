#!/usr/bin/env python
"""Fine-tune a published D-JEPA with LoRA: a new style for its classes, or new classes, from a few dozen images.

    accelerate launch examples/train_lora.py --pretrained_model_name_or_path my-org/djepa-base \\
        --train_data_dir my_images --output_dir outputs/my_lora

`my_images` has a folder for each class. A folder that is called like a class of the model shows that class; any other
is a new class, which gets a row of its own in the class table. Only adapter and new rows are trained; everything else,
and the embedding of every old class, stays as it is. The result is one file, `pytorch_lora_weights.safetensors`, with a
card and samples: `pipe.load_lora_weights("outputs/my_lora")`.

The losses are those of training. Targets come from the base's encoder, which is frozen. The prediction loss needs the
prediction head that the base was trained with: checkpoints and official files bring it, published pipelines do not, and
are tuned by the denoising loss alone. There is no moving average: what is trained is what is saved.

An adapter is at work for all classes. Where old ones shall stay as they are, `--num_prior_images` has the base draw
images of them first, which are trained on besides.
"""

import copy
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from tqdm.auto import tqdm
from train import PREVIEW_CLASSES, Run, is_hub_id, prepare, preview, recipe, show_plan, train

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAPipeline
from djepa_hf.accounting import num_parameters
from djepa_hf.arguments import DataArguments, SamplingArguments, TrainingArguments, option, parse_arguments
from djepa_hf.engines import start_processes
from djepa_hf.hub import check_token
from djepa_hf.labels import UnknownClassError, find_label_id
from djepa_hf.latents import vae_stride
from djepa_hf.loading import OFFICIAL_SUFFIXES, load_for_training
from djepa_hf.lora import DEFAULT_TARGETS, WEIGHT_NAME, Adapter, add_adapter
from djepa_hf.model_card import create_lora_card
from djepa_hf.seeds import seed_of
from djepa_hf.training_data import TrainingData
from djepa_hf.visualization import plot_losses

ADAPTER = "default"
DRAWN, PRIOR_BATCH = "prior_images.txt", 64
PRIOR = "prior-"  # and the class's id: what folders of images that the base drew are called


@dataclass
class LoraArguments:
    """What to add to which model."""

    pretrained_model_name_or_path: str = option(
        None, "The base: a pipeline or checkpoint of ours (folder or id), or an official .pth file."
    )
    rank: int = option(4, "Of the adapter.")
    lora_alpha: float | None = option(None, "The adapter's scale, times the rank; the rank if not given.")
    lora_dropout: float = option(0.0, "Dropout in front of the adapter.")
    target_modules: list[str] = option([], "Names of layers; attention and MLPs of all three networks if not given.")
    use_rslora: bool = option(False, "Scale by the root of the rank (rsLoRA).")
    use_dora: bool = option(False, "Train the weights' lengths apart from their directions (DoRA).")
    num_prior_images: int = option(
        0, "Images of its own classes that the base draws first, to train on besides: it forgets them otherwise."
    )
    push_to_hub: bool = option(False, "Upload the result.")
    hub_model_id: str | None = option(None, "To where, as owner/name.")

    def __post_init__(self):
        if self.pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` is missing: which model shall be tuned?")
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {self.rank}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), got {self.lora_dropout}.")
        if self.num_prior_images < 0:
            raise ValueError(f"`num_prior_images` must not be negative, got {self.num_prior_images}.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("`push_to_hub` needs `hub_model_id`.")

    @property
    def init_from(self) -> str:
        """As the training script calls it."""
        return self.pretrained_model_name_or_path

    @property
    def kept_settings(self) -> dict[str, Any]:
        """What a resumed run must not change."""
        names = ("pretrained_model_name_or_path", "rank", "lora_alpha", "lora_dropout", "target_modules")
        return {name: getattr(self, name) for name in (*names, "use_rslora", "use_dora", "num_prior_images")}

    @property
    def config(self) -> LoraConfig:
        """For peft."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules or DEFAULT_TARGETS,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


@dataclass
class LoraRun(Run):
    """A run that trains an adapter and rows of the class table, and knows no moving average."""

    has_average = False

    def __post_init__(self):
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("Adapters are small: train them on one GPU or with DDP.")
        self._ids = torch.tensor(known_ids(self.online.djepa.config, self.data.names))
        self.accelerator.register_save_state_pre_hook(self._save_adapter)
        self.accelerator.register_load_state_pre_hook(self._load_adapter)

    def class_ids(self, labels: torch.LongTensor) -> torch.LongTensor:
        return self._ids[labels]

    def update_average(self, decay: float):
        """There is none: the base's encoder gives the targets."""

    def preview_labels(self) -> list[int]:
        """Of the data, new ones first."""
        names = zip(self._ids.tolist(), self.data.names, strict=True)
        own = sorted({i for i, name in names if not name.startswith(PRIOR)}, reverse=True)
        return own[:PREVIEW_CLASSES]

    def pipeline(self) -> DJEPAPipeline:
        return self.pipeline_of(copy.deepcopy(self.online.djepa).eval())

    def check_sampling(self):
        pipe = self.pipeline_of(self.online.djepa)
        options = self.sampling.call_options(pipe.transformer.config.num_tokens)
        pipe.check_inputs(1, num_images_per_label=1, output_type="pil", **options)

    @property
    def adapter(self) -> Adapter:
        """As it is now."""
        return Adapter.of_model(self.online.djepa, ADAPTER)

    def _save_adapter(self, models: list, weights: list, folder: str):
        weights.clear()  # all else is the base's
        if self.accelerator.is_main_process:
            self.adapter.write(folder)

    def _load_adapter(self, models: list, folder: str):
        models.clear()
        saved, model = Adapter.read(folder), self.online.djepa
        shapes = [{name: tensor.shape for name, tensor in found.weights.items()} for found in (saved, self.adapter)]
        if shapes[0] != shapes[1] or saved.class_names != self.adapter.class_names:
            raise ValueError(
                f"The checkpoint {folder} holds an adapter of another rank, or for other layers or classes."
            )
        set_peft_model_state_dict(model, saved.weights, adapter_name=ADAPTER)
        if saved.class_rows is not None:
            model.get_input_embeddings().added[ADAPTER].data.copy_(saved.class_rows)


def known_ids(config: DJEPAConfig, names: list[str]) -> list[int | None]:
    """
    The model's id of each class of the data; nothing for new ones.

    Raises:
        ValueError: if a name is that of several classes.
    """
    ids = []
    for name in names:
        if name.startswith(PRIOR):
            ids.append(int(name.removeprefix(PRIOR)))
            continue
        try:
            ids.append(find_label_id(name, config.id2label))
        except UnknownClassError:
            ids.append(None)
    return ids


def model_with_adapter(args: LoraArguments, data: TrainingData, vae: AutoencoderKL | None) -> DJEPAForPreTraining:
    """The base, frozen, with a fresh adapter, and a row for every class that it does not know."""
    base, options = args.pretrained_model_name_or_path, {}
    if not brings_head(base):
        options["prediction_loss_weight"] = 0.0
    model = load_for_training(base, options)
    model.djepa.load_state_dict(model.target.state_dict())  # what is published, and sampled from
    model.requires_grad_(False)
    new = [name for name, i in zip(data.names, known_ids(model.config, data.names), strict=True) if i is None]
    model.target.config = copy.deepcopy(model.config)
    if new:
        model.target.add_classes(new)  # to the base they are no class in particular
        model.djepa.add_classes(new, adapter_name=ADAPTER)
    add_adapter(model.djepa, args.config, ADAPTER)  # which freezes all else
    model.djepa.get_input_embeddings().added.requires_grad_(True)
    count, all_parameters = num_parameters(model, only_trainable=True), num_parameters(model.djepa)
    print(
        f"Training {count:,} parameters, {count / all_parameters:.1%} of {all_parameters:,}. New classes: "
        f"{', '.join(new) or 'none'}."
    )
    return model


def brings_head(base: str) -> bool:
    """Whether a model comes with the prediction head that it was trained with."""
    if base.endswith(OFFICIAL_SUFFIXES):
        return True
    config = Path(base) / "config.json"
    return config.is_file() and "DJEPAForPreTraining" in config.read_text()


def fit_to_base(args: LoraArguments, data_args: DataArguments, run_args: TrainingArguments):
    """Images as the base wants them, in the latents of its autoencoder; previews in the way that it samples."""
    base = args.pretrained_model_name_or_path
    if base.endswith(OFFICIAL_SUFFIXES) or brings_head(base):
        return  # as the options say
    pipe = DJEPAPipeline.from_pretrained(base)
    shape, stride = pipe.transformer.config.sample_shape, 1
    if pipe.vae is not None:
        data_args.pretrained_vae_model_name_or_path = f"{base}/vae"
        stride = vae_stride(pipe.vae)
    data_args.resolution = [stride * side for side in shape]
    run_args.timestep_spacing = pipe.scheduler.config.get("timestep_spacing", run_args.timestep_spacing)


def draw_prior_images(
    args: LoraArguments, data_args: DataArguments, run_args: TrainingArguments, sampling: SamplingArguments
):
    """
    Puts the training images and some that the base draws of its own classes into one folder, `images` in the output
    folder, which is trained on then (prior preservation, as in DreamBooth, arXiv 2208.12242).
    """
    base, folder = args.pretrained_model_name_or_path, Path(run_args.output_dir) / "images"
    if data_args.train_data_dir is None or brings_head(base):
        raise ValueError("`num_prior_images` needs a pipeline as the base, and images in `train_data_dir`.")
    source = Path(data_args.train_data_dir)
    config = DJEPAConfig.from_pretrained(base, subfolder="transformer")
    given = known_ids(config, [path.name for path in source.iterdir() if path.is_dir()])
    others = [i for i in range(config.num_labels) if i not in given]
    if not others:
        raise ValueError("`num_prior_images`: the images show every class of the base, there is no other to draw.")
    if run_args.dry_run:
        return
    options = sampling.call_options(config.num_tokens)
    data_args.train_data_dir = str(folder)
    state = start_processes()
    with state.local_main_process_first():
        about = f"{args.num_prior_images} images drawn by {base}, seed {run_args.seed}, {options}, for {source}\n"
        done = folder.with_name(DRAWN)
        if done.is_file() and done.read_text() == about:
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
        shutil.copytree(source, folder)
        pipe = DJEPAPipeline.from_pretrained(base).to(state.device)
        pipe.set_progress_bar_config(disable=True)
        for start in tqdm(range(0, args.num_prior_images, PRIOR_BATCH), desc="drawing prior images", unit="batch"):
            numbers = range(start, min(start + PRIOR_BATCH, args.num_prior_images))
            seeds = [torch.Generator().manual_seed(seed_of("prior", run_args.seed, number)) for number in numbers]
            labels = [others[number % len(others)] for number in numbers]
            for number, label, image in zip(
                numbers, labels, pipe(labels, generator=seeds, **options).images, strict=True
            ):
                place = folder / f"{PRIOR}{label:05d}"
                place.mkdir(exist_ok=True)
                image.save(place / f"{number:05d}.png")
        done.write_text(about)


def publish(run: LoraRun, args: LoraArguments):
    """Writes the adapter with a card, samples and loss curves; uploads them, if asked to."""
    run.adapter.write(run.output_dir)
    pipe, base = preview(run, "final.png"), args.pretrained_model_name_or_path
    options = run.sampling.call_options(pipe.transformer.config.num_tokens)
    card = create_lora_card(
        args.hub_model_id or str(run.output_dir),
        base,
        class_names=run.adapter.class_names,
        example=pipe.transformer.config.id2label[run.preview_labels()[0]],
        training=recipe(run),
        sampling=options,
        base_is_on_hub=is_hub_id(base),
    )
    card.save(run.output_dir / "README.md")
    losses = {name.replace("_", " "): values for name, values in run.history.losses.items() if any(values)}
    plot_losses(list(range(1, run.step + 1)), losses, run.output_dir / "loss.png", f"LoRA, rank {args.rank}")
    (run.output_dir / "sampling.yaml").write_text(yaml.safe_dump(asdict(run.sampling), sort_keys=False))
    print(f"The adapter is {run.output_dir / WEIGHT_NAME}; look at {run.output_dir / 'previews' / 'final.png'}.")
    if args.push_to_hub:
        repo = create_repo(args.hub_model_id, exist_ok=True).repo_id
        files = [WEIGHT_NAME, "README.md", "sampling.yaml", "loss.png", "previews/final.png"]
        print(upload_folder(repo_id=repo, folder_path=run.output_dir, allow_patterns=files).commit_url)


def main(argv: list[str] | None = None):
    kinds = (LoraArguments, DataArguments, TrainingArguments, SamplingArguments)
    lora, data_args, args, sampling = parse_arguments(*kinds, argv=argv, description=__doc__)
    if lora.push_to_hub:
        check_token(None)
    fit_to_base(lora, data_args, args)
    if lora.num_prior_images:
        draw_prior_images(lora, data_args, args, sampling)
    run = prepare(lora, data_args, args, sampling, model_with_adapter, LoraRun)
    if args.dry_run:
        show_plan(run)
    elif train(run):
        if run.accelerator.is_main_process:
            publish(run, lora)
        run.accelerator.wait_for_everyone()
        run.accelerator.end_training()


if __name__ == "__main__":
    main()
