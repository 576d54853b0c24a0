#!/usr/bin/env python
"""Train D-JEPA on images of classes.

    accelerate launch examples/train.py --config examples/configs/digits.yaml
    accelerate launch examples/train.py --train_data_dir my_images --resolution 64 --patch_size 4 --output_dir outputs/mine

Every option can stand in the YAML file and on the command line, which goes before the file. The result is a pipeline
folder in `--output_dir`, with the moving average (EMA) of the weights, and beside it `loss.png` and `previews/`.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAPipeline
from djepa_hf.arguments import DataArguments, ModelArguments, SamplingArguments, TrainingArguments, parse_arguments
from djepa_hf.checkpoints import find_checkpoint, save_checkpoint
from djepa_hf.data import image_transform, load_training_data, num_image_channels
from djepa_hf.latents import encode_images
from djepa_hf.optimization import ema_decay, parameter_groups, set_weight_decay
from djepa_hf.schedulers import token_scheduler_for
from djepa_hf.visualization import labelled_grid, plot_losses

PREVIEW_CLASSES, PREVIEW_IMAGES = 10, 8


class LossHistory:
    """Losses of every step, kept across a resume."""

    def __init__(self):
        self.losses: dict[str, list[float]] = {"diffusion loss": [], "prediction loss": []}

    def append(self, diffusion_loss: float, prediction_loss: float):
        self.losses["diffusion loss"].append(diffusion_loss)
        self.losses["prediction loss"].append(prediction_loss)

    def state_dict(self) -> dict:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict):
        self.losses = state["losses"]


def load_vae(name_or_path: str) -> AutoencoderKL:
    """An autoencoder from a folder or from the Hub (`owner/name` or `owner/name/subfolder`)."""
    if not Path(name_or_path).is_dir() and name_or_path.count("/") > 1:
        owner, name, subfolder = name_or_path.split("/", 2)
        vae = AutoencoderKL.from_pretrained(f"{owner}/{name}", subfolder=subfolder)
    else:
        vae = AutoencoderKL.from_pretrained(name_or_path)
    return vae.requires_grad_(False).eval()


def model_config(
    args: ModelArguments, names: list[str], resolution: int, channels: int, vae: AutoencoderKL | None
) -> DJEPAConfig:
    """The model's configuration: sizes from the options, the rest from data and autoencoder."""
    options = {name: value for name, value in asdict(args).items() if value is not None}
    if vae is not None:
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        if resolution % stride:
            raise ValueError(f"`resolution` {resolution} must be divisible by the VAE's stride {stride}.")
        resolution, channels = resolution // stride, vae.config.latent_channels
    options |= {"sample_size": resolution, "num_channels": channels, "id2label": dict(enumerate(names))}
    return DJEPAConfig.from_preset(options.pop("preset"), **options)


def preview(pipe: DJEPAPipeline, sampling: SamplingArguments, seed: int, path: Path):
    """A labelled grid of the first classes, from the same noise every time."""
    config = pipe.transformer.config
    labels = list(range(min(PREVIEW_CLASSES, config.num_labels)))
    options = sampling.call_options(config.num_tokens)
    generator = torch.Generator().manual_seed(seed)
    images = pipe(labels, num_images_per_label=PREVIEW_IMAGES, generator=generator, **options).images
    rows = [images[i * PREVIEW_IMAGES : (i + 1) * PREVIEW_IMAGES] for i in range(len(labels))]
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid([(config.id2label[i], row) for i, row in zip(labels, rows, strict=True)]).save(path)


def main(argv: list[str] | None = None):
    model_args, data_args, args, sampling = parse_arguments(
        ModelArguments, DataArguments, TrainingArguments, SamplingArguments, argv=argv, description=__doc__
    )
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed, device_specific=True)

    # 1. Data, autoencoder and model
    data = load_training_data(
        data_args.dataset_name, data_args.train_data_dir, data_args.image_column, data_args.label_column
    )
    channels = num_image_channels(data[0]["image"])
    vae = load_vae(data_args.pretrained_vae_model_name_or_path) if data_args.pretrained_vae_model_name_or_path else None
    if vae is not None:
        channels = vae.config.in_channels
    names = data.features["label"].names
    config = model_config(model_args, names, data_args.resolution, channels, vae)
    model = DJEPAForPreTraining(config)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    resume = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None

    # 2. Batches, optimizer and schedules
    data.set_transform(image_transform(data_args.resolution, channels, data_args.random_flip))
    loader = DataLoader(
        data,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=len(data) >= args.train_batch_size,
        num_workers=data_args.dataloader_num_workers,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    steps_per_epoch = math.ceil(len(loader) / accelerator.num_processes / args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    # a prepared schedule advances once per process and step
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    if vae is not None:
        vae.to(accelerator.device)
    history = LossHistory()
    accelerator.register_for_checkpointing(history)
    online = accelerator.unwrap_model(model)
    pipe = DJEPAPipeline(online.target, token_scheduler_for(config.objective), vae)
    pipe.set_progress_bar_config(disable=True)

    step = 0
    if resume is not None:
        folder, step = resume
        accelerator.load_state(folder)
        accelerator.print(f"Resuming after step {step} from {folder}.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    if args.report_to:
        accelerator.init_trackers("djepa", config={**asdict(args), **asdict(data_args), **asdict(model_args)})
    batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    accelerator.print(
        f"{len(data):,} images of {len(names)} classes; {online.djepa.num_parameters():,} parameters; "
        f"{total_steps:,} steps of {batch} images on {accelerator.num_processes} x {accelerator.device.type}."
    )

    # 3. Train
    progress = tqdm(total=total_steps, initial=step, desc="training", disable=not accelerator.is_main_process)
    started, first_step = time.perf_counter(), step
    epoch, done = divmod(step, steps_per_epoch)
    model.train()
    while step < total_steps:
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps) if done else loader
        for batch_of_images in batches:
            with accelerator.accumulate(model):
                with torch.no_grad():
                    sample = encode_images(batch_of_images["sample"], vae)
                output = model(sample, batch_of_images["class_labels"])
                if not torch.isfinite(output.loss):
                    folder = save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
                    raise FloatingPointError(
                        f"The loss became {output.loss.item()} in step {step + 1}. The last good state, of step {step}, "
                        f"is in {folder}. A lower learning rate or `mixed_precision` 'no' may help."
                    )
                set_weight_decay(optimizer, args.adam_weight_decay, step / total_steps)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            online.update_target(ema_decay(args.ema_decay, step))

            # 4. Show and save
            losses = {"diffusion_loss": output.diffusion_loss.item(), "prediction_loss": output.prediction_loss.item()}
            history.append(**losses)
            progress.update()
            rate = (step - first_step) * batch / (time.perf_counter() - started)
            progress.set_postfix(
                {**{name: f"{value:.3f}" for name, value in losses.items()}, "images/s": f"{rate:.0f}"}
            )
            if args.report_to and step % args.logging_steps == 0:
                accelerator.log({**losses, "lr": lr_scheduler.get_last_lr()[0], "images_per_second": rate}, step=step)
            if args.validation_steps and step % args.validation_steps == 0 and accelerator.is_main_process:
                preview(pipe, sampling, args.seed, output_dir / "previews" / f"step-{step:06d}.png")
            if args.checkpointing_steps and step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
            if step == total_steps:
                break
        epoch, done = epoch + 1, 0
    progress.close()

    # 5. Publish the moving average
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pipe.save_pretrained(output_dir)
        preview(pipe, sampling, args.seed, output_dir / "previews" / "final.png")
        title = f"{config.objective}, {online.djepa.num_parameters() / 1e6:.1f}M parameters"
        plot_losses(list(range(1, step + 1)), history.losses, output_dir / "loss.png", title)
        print(f"The pipeline in {output_dir} holds the EMA weights of step {step}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
