#!/usr/bin/env python
"""Train D-JEPA on images of classes.

    accelerate launch examples/train.py --config examples/configs/digits.yaml
    accelerate launch examples/train.py --train_data_dir my_images --resolution 64 --patch_size 4

Every option can stand in the YAML file and on the command line, which goes before the file. The result is a pipeline
folder in `--output_dir`, with the moving average (EMA) of the weights, and beside it `loss.png`, `previews/` and the
sampling options as `sampling.yaml` for the other scripts.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAPipeline
from djepa_hf.arguments import DataArguments, ModelArguments, SamplingArguments, TrainingArguments, parse_arguments
from djepa_hf.checkpoints import find_checkpoint, save_checkpoint
from djepa_hf.configuration_djepa import PRESETS
from djepa_hf.data import image_transform, load_training_data, num_image_channels
from djepa_hf.latents import encode_images
from djepa_hf.loading import load_for_training, load_vae
from djepa_hf.model_card import create_model_card
from djepa_hf.optimization import ema_decay, parameter_groups, set_weight_decay
from djepa_hf.schedulers import token_scheduler_for
from djepa_hf.visualization import labelled_grid, plot_losses

PREVIEW_CLASSES, PREVIEW_IMAGES = 10, 8


class History:
    """What happened so far, kept across a resume: the weights that training started from, the losses of every step."""

    def __init__(self, init_from: str | None):
        self.init_from = init_from
        self.losses: dict[str, list[float]] = {"diffusion_loss": [], "prediction_loss": []}

    def append(self, losses: dict[str, float]):
        for name, loss in losses.items():
            self.losses[name].append(loss)

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict):
        vars(self).update(state)


@dataclass
class Run:
    """All that a training run works with."""

    args: TrainingArguments
    sampling: SamplingArguments
    accelerator: Accelerator
    model: DJEPAForPreTraining  # as Accelerate prepared it: possibly wrapped
    loader: DataLoader
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    vae: AutoencoderKL | None
    total_steps: int
    steps_per_epoch: int
    source: str  # of the data
    history: History
    step: int = 0

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def online(self) -> DJEPAForPreTraining:
        return self.accelerator.unwrap_model(self.model)

    def save(self) -> Path:
        limit = self.args.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, self.step, self.online.config, limit)

    def pipeline(self) -> DJEPAPipeline:
        """A pipeline over the moving average as it is now."""
        objective = self.online.config.objective
        options = {"timestep_spacing": self.args.timestep_spacing} if objective == "diffusion" else {}
        pipe = DJEPAPipeline(self.online.export("ema"), token_scheduler_for(objective, **options), self.vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def check_sampling(self):
        """Raises a `ValueError` now, rather than after training, if previews could not be sampled."""
        pipe = self.pipeline()
        options = self.sampling.call_options(pipe.transformer.config.num_tokens)
        pipe.check_inputs(1, num_images_per_label=1, output_type="pil", **options)


def initial_model(
    args: ModelArguments, names: list[str], resolution: int, channels: int, vae: AutoencoderKL | None
) -> DJEPAForPreTraining:
    """The model before the first step: sizes from the options, the rest from data and autoencoder."""
    options = {name: value for name, value in asdict(args).items() if value is not None}
    preset, init_from = options.pop("preset", None), options.pop("init_from", None)
    if vae is not None:
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        if resolution % stride:
            raise ValueError(f"`resolution` {resolution} must be divisible by the VAE's stride {stride}.")
        resolution, channels = resolution // stride, vae.config.latent_channels
        options["latent_scaling_factor"] = vae.config.scaling_factor
    options |= {"sample_size": resolution, "num_channels": channels, "id2label": dict(enumerate(names))}
    if init_from is None:
        return DJEPAForPreTraining(DJEPAConfig.from_preset(preset or "base", **options))
    return load_for_training(init_from, PRESETS.get(preset, {}) | options)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, sampling: SamplingArguments
) -> Run:
    """Loads and checks everything before the first step."""
    output_dir = Path(args.output_dir)
    resume = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if resume is None and any(output_dir.glob("checkpoint-*")):
        raise ValueError(
            f"{output_dir} holds checkpoints of another run: pass `resume_from_checkpoint` 'latest' to go on with it, "
            "or another `output_dir`."
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed, device_specific=True)

    data = load_training_data(
        data_args.dataset_name, data_args.train_data_dir, data_args.image_column, data_args.label_column
    )
    names = data.features["label"].names
    vae = load_vae(data_args.pretrained_vae_model_name_or_path) if data_args.pretrained_vae_model_name_or_path else None
    channels = num_image_channels(data) if vae is None else vae.config.in_channels
    model = initial_model(model_args, names, data_args.resolution, channels, vae)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()

    data.set_transform(image_transform(data_args.resolution, channels, data_args.random_flip))
    loader = DataLoader(
        data,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=len(data) >= args.train_batch_size,
        num_workers=data_args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),  # of its own: shuffling must not disturb the model's draws
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    loader = accelerator.prepare(loader)  # first: its length is now this process's share
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    total_steps = args.num_train_epochs * steps_per_epoch if args.max_train_steps is None else args.max_train_steps
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,  # a prepared schedule advances once per
        num_training_steps=total_steps * accelerator.num_processes,  # process and step
    )
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    if vae is not None:
        vae.to(accelerator.device)
    run = Run(
        args,
        sampling,
        accelerator,
        model,
        loader,
        optimizer,
        lr_scheduler,
        vae,
        total_steps,
        steps_per_epoch,
        source=data_args.dataset_name or Path(data_args.train_data_dir).name,
        history=History(model_args.init_from),
    )
    run.check_sampling()
    accelerator.register_for_checkpointing(run.history)
    if resume is not None:
        folder, run.step = resume
        accelerator.load_state(folder)
        accelerator.print(f"Resuming after step {run.step} from {folder}.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    if args.report_to:
        accelerator.init_trackers("djepa", config=asdict(args) | asdict(data_args) | asdict(model_args))
    accelerator.print(
        f"{len(data):,} images of {len(names)} classes, {run.online.djepa.num_parameters():,} parameters, "
        f"{total_steps:,} steps on {accelerator.num_processes} x {accelerator.device.type}."
    )
    return run


def training_step(run: Run, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    Forward, backward and, at the end of an accumulation, an update of weights and moving average.

    Raises:
        FloatingPointError: if a loss or gradient is not finite. The state before this step is saved first.
    """
    args, accelerator = run.args, run.accelerator
    with torch.no_grad():
        sample = encode_images(batch["sample"], run.vae)
    output = run.model(sample, batch["class_labels"])
    # one loss that is not finite, on any process, makes the mean so
    losses = accelerator.reduce(torch.stack([output.diffusion_loss, output.prediction_loss]).detach(), "mean").tolist()
    if not all(map(math.isfinite, losses)):
        stop_at_last_good_state(run, f"The losses became {losses}")
    set_weight_decay(run.optimizer, args.adam_weight_decay, run.step / run.total_steps)
    accelerator.backward(output.loss)
    if accelerator.sync_gradients:
        norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
        if accelerator.scaler is None and not torch.isfinite(norm):  # a scaler lowers its scale and skips the step
            stop_at_last_good_state(run, f"The gradient's norm became {norm.item()}")
    run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad()
    if accelerator.sync_gradients:
        run.step += 1
        # the ramp is there to forget a random start; an average of earlier training is worth keeping
        decay = args.ema_decay if run.history.init_from else ema_decay(args.ema_decay, run.step)
        run.online.update_target(decay)
    return dict(zip(("diffusion_loss", "prediction_loss"), losses, strict=True))


def stop_at_last_good_state(run: Run, problem: str):
    """Saves the state, which the failed step has not touched, and raises."""
    folder = run.save()
    raise FloatingPointError(
        f"{problem} in step {run.step + 1}. The last good state, after step {run.step}, is in {folder}. A lower "
        "`learning_rate` or `mixed_precision` 'no' may help."
    )


def train(run: Run):
    """Steps until `total_steps`, with a progress bar, previews, checkpoints and trackers."""
    args, accelerator, first_step = run.args, run.accelerator, run.step
    images_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    progress = tqdm(total=run.total_steps, initial=run.step, desc="training", disable=not accelerator.is_main_process)
    started = time.perf_counter()
    epoch, done = divmod(run.step, run.steps_per_epoch)
    run.model.train()
    losses_of_step = []
    while run.step < run.total_steps:
        run.loader.set_epoch(epoch)
        skipped = done * args.gradient_accumulation_steps
        for batch in accelerator.skip_first_batches(run.loader, skipped) if skipped else run.loader:
            with accelerator.accumulate(run.model):
                losses_of_step.append(training_step(run, batch))
            if not accelerator.sync_gradients:
                continue
            losses = {
                name: sum(part[name] for part in losses_of_step) / len(losses_of_step) for name in losses_of_step[0]
            }
            losses_of_step.clear()
            run.history.append(losses)
            rate = (run.step - first_step) * images_per_step / (time.perf_counter() - started)
            shown = {name: f"{value:.3f}" for name, value in losses.items()}
            progress.set_postfix(shown | {"images/s": f"{rate:.0f}"}, refresh=False)
            progress.update()
            if args.report_to and run.step % args.logging_steps == 0:
                learning_rate = run.lr_scheduler.get_last_lr()[0]
                accelerator.log({**losses, "lr": learning_rate, "images_per_second": rate}, step=run.step)
            if args.validation_steps and run.step % args.validation_steps == 0:
                preview(run, f"step-{run.step:06d}.png")
            if args.checkpointing_steps and run.step % args.checkpointing_steps == 0:
                run.save()
            if run.step == run.total_steps:
                break
        epoch, done = epoch + 1, 0
    progress.close()


def preview(run: Run, name: str):
    """A labelled grid of the first classes from the moving average, from the same noise every time."""
    if not run.accelerator.is_main_process:
        return
    pipe = run.pipeline()
    config = pipe.transformer.config
    labels = list(range(min(PREVIEW_CLASSES, config.num_labels)))
    options = run.sampling.call_options(config.num_tokens)
    generator = torch.Generator().manual_seed(run.args.seed)
    images = pipe(labels, num_images_per_label=PREVIEW_IMAGES, generator=generator, **options).images
    rows = [(config.id2label[i], images[i * PREVIEW_IMAGES : (i + 1) * PREVIEW_IMAGES]) for i in labels]
    folder = run.output_dir / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    labelled_grid(rows).save(folder / name)


def publish(run: Run):
    """Writes the pipeline, with the moving average, a last preview and the loss curves."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        pipe = run.pipeline()
        pipe.save_pretrained(run.output_dir)
        sampling = run.sampling.call_options(run.online.config.num_tokens)
        card = create_model_card(
            pipe,
            str(run.output_dir),
            recipe(run),
            sampling=sampling,
            datasets=[run.source] if is_hub_id(run.source) else None,
            base_model=run.history.init_from if is_hub_id(run.history.init_from) else None,
        )
        card.save(run.output_dir / "README.md")
        preview(run, "final.png")
        parameters = run.online.djepa.num_parameters() / 1e6
        title = f"{run.online.config.objective}, {parameters:.1f}M parameters"
        losses = {name.replace("_", " "): values for name, values in run.history.losses.items()}
        plot_losses(list(range(1, run.step + 1)), losses, run.output_dir / "loss.png", title)
        (run.output_dir / "sampling.yaml").write_text(yaml.safe_dump(asdict(run.sampling), sort_keys=False))
        print(f"The pipeline in {run.output_dir} holds the EMA weights after step {run.step}.")
    run.accelerator.end_training()


def is_hub_id(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not Path(name).exists()


def recipe(run: Run) -> str:
    """What the model card says of the training, in Markdown."""
    args, accelerator = run.args, run.accelerator
    batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    images = f"{len(run.loader.dataset):,} images of {run.source}"
    init_from = run.history.init_from
    start = f" It started from the weights of `{init_from}`." if init_from else ""
    return (
        f"On {images}: {run.step:,} steps with a batch of {batch}, AdamW with a peak learning rate of "
        f"{args.learning_rate:g} ({args.lr_scheduler}, {args.lr_warmup_steps:,} steps of warm-up), betas "
        f"{args.adam_beta1:g} and {args.adam_beta2:g}, weight decay rising from 0 to {args.adam_weight_decay:g}, "
        f"gradients clipped to {args.max_grad_norm:g}, moving average with a decay of {args.ema_decay:g}, mixed "
        f"precision {accelerator.mixed_precision}.{start}"
    )


def parse_options(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments, SamplingArguments]:
    kinds = (ModelArguments, DataArguments, TrainingArguments, SamplingArguments)
    return parse_arguments(*kinds, argv=argv, description=__doc__)


def main(argv: list[str] | None = None):
    run = prepare(*parse_options(argv))
    train(run)
    publish(run)


if __name__ == "__main__":
    main()
