#!/usr/bin/env python
"""Train D-JEPA on images of classes.

    accelerate launch examples/train.py --config examples/configs/digits.yaml
    accelerate launch examples/train.py --train_data_dir my_images --resolution 64 --patch_size 4

Every option can stand in the YAML file and on the command line, which goes before the file. The result is a pipeline
folder in `--output_dir`, with the moving average (EMA) of the weights and a model card, and beside it `loss.png`,
`previews/` and the sampling options as `sampling.yaml` for the other scripts.

A run that was killed goes on with `--resume_from_checkpoint latest`; SIGTERM and SIGUSR1 save a checkpoint and stop.
`--dry_run` shows what would be done, and stops.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from PIL import Image
from tqdm.auto import tqdm

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAModel, DJEPAPipeline
from djepa_hf.accounting import cost_of_training, num_parameters
from djepa_hf.arguments import DataArguments, ModelArguments, SamplingArguments, TrainingArguments, parse_arguments
from djepa_hf.batches import Batches, batch_loader
from djepa_hf.checkpoints import check_same_model, find_checkpoint, save_checkpoint, set_aside_later
from djepa_hf.configuration_djepa import PRESETS
from djepa_hf.draws import at_noise_level, draw_training
from djepa_hf.engines import average_as_model, load_state, prepare_engine, start_engine, update_average
from djepa_hf.interruption import StopSignals
from djepa_hf.json_files import write_json
from djepa_hf.latents import decode_samples, latent_size, latents_of_moments, posterior_moments
from djepa_hf.loading import load_for_training, load_vae
from djepa_hf.model_card import create_model_card
from djepa_hf.optimization import ema_decay, parameter_groups, set_weight_decay
from djepa_hf.schedulers import token_scheduler_for
from djepa_hf.seeds import seed_of
from djepa_hf.training_data import TrainingData, load_training_samples
from djepa_hf.visualization import film_strip, labelled_grid, plot_losses, plot_noise_levels

PREVIEW_CLASSES, PREVIEW_IMAGES, SHOWN_IMAGES = 10, 8, 12
KEPT_SETTINGS = ("seed", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon")
NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class History:
    """What happened so far, kept across a resume."""

    def __init__(self, init_from: str | None, settings: dict):
        self.init_from = init_from  # the weights that training started from
        self.settings = settings  # what a resumed run would otherwise ignore, or go astray by
        self.skipped_steps = 0
        self.noise_levels: dict[int, list[float]] = {}  # step -> diffusion loss at each of NOISE_LEVELS
        self.losses: dict[str, list[float]] = {"diffusion_loss": [], "prediction_loss": []}

    def append(self, losses: dict[str, float]):
        for name, loss in losses.items():
            self.losses[name].append(loss)

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict):
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"The checkpoint was made with {name} {state['settings'].get(name)}, this run has {value}: a "
                    "resumed run keeps to its settings. To train on with others, start a new one with `init_from`."
                )
        vars(self).update(state)


@dataclass
class Run:
    """All that a training run works with."""

    has_average = True
    args: TrainingArguments
    sampling: SamplingArguments
    accelerator: Accelerator
    model: DJEPAForPreTraining  # as Accelerate prepared it: possibly wrapped
    data: TrainingData
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    vae: AutoencoderKL | None
    total_steps: int
    history: History
    signals: StopSignals
    mixed_precision: str
    resumed_from: Path | None = None
    step: int = 0
    skipped_in_a_row: int = 0
    unreadable: set[str] = field(default_factory=set)

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def images_per_step(self) -> int:
        return self.history.settings["images per step"]

    @property
    def online(self) -> DJEPAForPreTraining:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def save(self) -> Path:
        limit = self.args.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, self.step, self.online.config, limit)

    def pipeline(self) -> DJEPAPipeline | None:
        """
        A pipeline over the moving average as it is now. Where the weights are spread over processes, all must call
        this, and the main process gets it.
        """
        model = average_as_model(self.accelerator, self.model)
        return None if model is None else self.pipeline_of(model)

    def pipeline_of(self, model: DJEPAModel) -> DJEPAPipeline:
        objective = model.config.objective
        options = {"timestep_spacing": self.args.timestep_spacing} if objective == "diffusion" else {}
        pipe = DJEPAPipeline(model, token_scheduler_for(objective, **options), self.vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def class_ids(self, labels: torch.LongTensor) -> torch.LongTensor:
        """The model's ids of classes of the data."""
        return labels

    def preview_labels(self) -> list[int]:
        """The classes to show."""
        return list(range(min(PREVIEW_CLASSES, self.online.config.num_labels)))

    def update_average(self, decay: float):
        """One step of the moving average."""
        update_average(self.accelerator, self.online, decay)

    def check_sampling(self):
        """Raises a `ValueError` now, rather than after training, if previews could not be sampled."""
        with torch.device("meta"):
            pipe = self.pipeline_of(DJEPAModel(self.online.config))
        options = self.sampling.call_options(pipe.transformer.config.num_tokens)
        pipe.check_inputs(1, num_images_per_label=1, output_type="pil", **options)


def initial_model(args: ModelArguments, data: TrainingData, vae: AutoencoderKL | None) -> DJEPAForPreTraining:
    """The model before the first step: sizes from the options, the rest from data and autoencoder."""
    options = {name: value for name, value in asdict(args).items() if value is not None}
    preset, init_from = options.pop("preset", None), options.pop("init_from", None)
    options |= {"sample_size": data.resolution, "num_channels": data.channels, "id2label": dict(enumerate(data.names))}
    if vae is not None:
        options |= {"sample_size": latent_size(data.resolution, vae), "num_channels": vae.config.latent_channels}
        options["latent_scaling_factor"] = vae.config.scaling_factor
    if init_from is None:
        return DJEPAForPreTraining(DJEPAConfig.from_preset(preset or "base", **options))
    return load_for_training(init_from, PRESETS.get(preset, {}) | options)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    sampling: SamplingArguments,
    build: Callable[..., DJEPAForPreTraining] = initial_model,
    kind: type[Run] = Run,
) -> Run:
    """
    Loads and checks everything before the first step. `build` makes the model, `kind` says what a run of it does; both
    are those of training from scratch if not given.
    """
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
    )
    mixed_precision = start_engine(accelerator, args.gradient_accumulation_steps)
    resume = args.resume_from_checkpoint
    resume = find_checkpoint(accelerator, output_dir, resume) if resume else None
    if resume is None and any(output_dir.glob("checkpoint-*")):
        raise ValueError(
            f"{output_dir} holds checkpoints of another run: pass `resume_from_checkpoint` 'latest' to go on with it, "
            "or another `output_dir`."
        )
    vae = data_args.pretrained_vae_model_name_or_path
    vae = load_vae(vae) if vae else None
    data = load_training_samples(data_args, vae, args.seed, accelerator.process_index, accelerator.num_processes)
    set_seed(args.seed)  # the same weights on every process: engines that cut them up take a piece from each
    model = build(model_args, data, vae)
    set_seed(args.seed, device_specific=True)  # dropout is each process's own
    if resume is not None:
        check_same_model(model.config, resume[0])
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * data.count_images() / global_batch)
    optimizer = torch.optim.AdamW(
        parameter_groups(model),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    # not prepared: it advances once per step, whatever the number of processes
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=total_steps
    )
    model, optimizer = prepare_engine(accelerator, model, optimizer, args.train_batch_size, args.max_grad_norm)
    if vae is not None:
        vae.to(accelerator.device)
    settings = {name: getattr(args, name) for name in KEPT_SETTINGS}
    settings |= {"images per step": global_batch, "data": data.source, **getattr(model_args, "kept_settings", {})}
    if data.is_stream:
        settings["processes x workers"] = f"{accelerator.num_processes} x {data.num_workers}"
        settings["images per process and batch"] = args.train_batch_size
    history, signals = History(model_args.init_from, settings), StopSignals()
    state = (lr_scheduler, vae, total_steps, history, signals, mixed_precision)
    run = kind(args, sampling, accelerator, model, data, optimizer, *state)
    run.check_sampling()
    accelerator.register_for_checkpointing(history, lr_scheduler)
    if resume is not None:
        folder, run.step = resume
        run.resumed_from = folder
        load_state(accelerator, run.online, folder)
        accelerator.step = 0  # its count of batches, by which it accumulates: steps may be cut up differently now
        if accelerator.is_main_process and folder.parent == output_dir and not args.dry_run:
            set_aside_later(output_dir, run.step)
        accelerator.wait_for_everyone()
        accelerator.print(f"Resuming after step {run.step} from {folder}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.report_to and not args.dry_run:
        config = asdict(args) | asdict(data_args) | asdict(model_args)
        config["resolution"] = "x".join(map(str, data_args.resolution))  # TensorBoard knows no lists
        accelerator.init_trackers("djepa", config=config)
    accelerator.print(
        f"{data.source}: {len(data.names)} classes, {num_parameters(run.online.djepa):,} parameters, "
        f"{total_steps:,} steps of {global_batch} images on {accelerator.num_processes} x {accelerator.device.type}."
    )
    return run


@torch.no_grad()
def model_inputs(run: Run, batch: dict, number: int) -> dict:
    """
    What the model gets for a batch of this process, the `number`-th since training began.

    All randomness but dropout is drawn for the batches of all processes together, and depends on the seed and on
    `number` alone: one process or eight, interrupted or not, the losses are the same.
    """
    accelerator, size, online = run.accelerator, len(batch["class_labels"]), run.online
    first, together = accelerator.process_index * size, accelerator.num_processes * size
    sample, device = batch["sample"].to(accelerator.device, non_blocking=True), accelerator.device
    if run.vae is not None:
        moments = (sample if run.data.is_cached else posterior_moments(sample, run.vae)).float()
        generator = torch.Generator(device).manual_seed(seed_of("latents", run.args.seed, number))
        noise = torch.randn(together, moments.shape[1] // 2, *moments.shape[2:], generator=generator, device=device)
        vae = run.vae.config
        sample = latents_of_moments(moments, noise[first : first + size], vae.scaling_factor, vae.shift_factor)
    seed = seed_of("step", run.args.seed, number)
    draws = draw_training(online.config, online.token_scheduler, together, device, seed)
    labels = run.class_ids(batch["class_labels"]).to(device, non_blocking=True)
    return {"sample": sample, "class_labels": labels, "draws": draws.rows(first, first + size)}


def training_step(run: Run, batches: Iterator[dict]) -> dict[str, float]:
    """
    One update of weights and moving average, from `gradient_accumulation_steps` batches.

    A step whose loss or gradient is not finite changes nothing: it is counted, and the images are written down.

    Raises:
        FloatingPointError: after `max_skipped_steps` such steps in a row. A checkpoint is saved first.
    """
    args, accelerator = run.args, run.accelerator
    accumulated, ids = [], []
    set_weight_decay(run.optimizer, args.adam_weight_decay, run.step / run.total_steps)
    for i in range(args.gradient_accumulation_steps):
        batch = next(batches)
        write_down_unreadable(run, batch["unreadable"])
        ids += batch["id"].tolist() if isinstance(batch["id"], torch.Tensor) else batch["id"]
        with accelerator.accumulate(run.model):
            output = run.model(**model_inputs(run, batch, run.step * args.gradient_accumulation_steps + i))
            accelerator.backward(output.loss)  # DeepSpeed steps here, too, unless the gradient is not finite
            accumulated.append(torch.stack([output.diffusion_loss, output.prediction_loss]).detach())
    norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    norm = torch.as_tensor(norm, device=accelerator.device)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all pieces, where weights are spread
    asked_to_stop = torch.tensor([float(run.signals.name is not None)], device=accelerator.device)
    stats = accelerator.reduce(torch.cat([torch.stack(accumulated).mean(0), asked_to_stop]), "mean")
    *losses, stop, norm = torch.cat([stats, norm.reshape(1).to(stats)]).tolist()  # the step's one wait for the device
    losses = dict(zip(run.history.losses, losses, strict=True))
    is_finite = all(map(math.isfinite, (*losses.values(), norm)))
    if is_finite or accelerator.scaler is not None:  # a scaler skips by itself, and lowers its scale
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.lr_scheduler.step()
    run.step += 1
    run.history.append(losses)
    # the ramp is there to forget a random start; an average of earlier training is worth keeping
    ramps = args.ema_warmup and not run.history.init_from
    decay = ema_decay(args.ema_decay, run.step) if ramps else args.ema_decay
    if is_finite:
        run.update_average(decay)
    count_skipped(run, is_finite, losses | {"gradient_norm": norm}, ids)
    return losses | {"gradient_norm": norm, "ema_decay": decay, "stop": stop}


def count_skipped(run: Run, is_finite: bool, values: dict[str, float], ids: list[int]):
    """Writes down a step that was skipped, and stops a run that does nothing else."""
    if is_finite:
        run.skipped_in_a_row = 0
        return
    run.history.skipped_steps += 1
    run.skipped_in_a_row += 1
    values = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}  # JSON has no NaN
    record = {"step": run.step, "process": run.accelerator.process_index, **values, "images": ids}
    with (run.output_dir / "skipped_steps.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    if run.skipped_in_a_row >= run.args.max_skipped_steps:
        folder = run.save()
        raise FloatingPointError(
            f"Losses or gradients were not finite in {run.skipped_in_a_row} steps in a row, the last with {values}. "
            f"{run.output_dir / 'skipped_steps.jsonl'} lists the images, {folder} holds the weights before. A lower "
            "`learning_rate` or `mixed_precision` 'no' may help."
        )


def write_down_unreadable(run: Run, names: list[str]):
    """Counts images that could not be read and names them in a file; too many are an error."""
    new = [name for name in dict.fromkeys(names) if name not in run.unreadable]
    if not new:
        return
    run.unreadable.update(new)
    path = run.output_dir / "unreadable_images.log"
    with path.open("a") as file:
        file.writelines(f"{name}\n" for name in new)
    if len(run.unreadable) > run.args.max_unreadable_images:
        raise ValueError(
            f"{len(run.unreadable)} images could not be read, more than `max_unreadable_images` "
            f"({run.args.max_unreadable_images}). {path} names them."
        )


def training_batches(run: Run) -> Batches:
    """The batches of this process, from where the run is; checkpoints keep the place in a stream."""
    args, accelerator, is_stream = run.args, run.accelerator, run.data.is_stream
    place_file, place = f"stream_{accelerator.process_index}.json", None
    if is_stream and run.resumed_from is not None:
        place = json.loads((run.resumed_from / place_file).read_text())
    batches = batch_loader(
        run.data.samples,
        args.train_batch_size,
        run.data.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
        args.seed,
        first_batch=run.step * args.gradient_accumulation_steps,
        place=place,
    )
    if is_stream:
        accelerator.register_save_state_pre_hook(
            lambda models, weights, folder: write_json(Path(folder) / place_file, batches.place)
        )
    return batches


def train(run: Run) -> bool:
    """
    Steps until `total_steps`, with a progress bar, previews, checkpoints and trackers.

    Returns:
        `bool`: whether training is over, and was not stopped by a signal.
    """
    args, accelerator, first_step, stop = run.args, run.accelerator, run.step, False
    if run.step >= run.total_steps:
        return True
    progress = tqdm(total=run.total_steps, initial=run.step, desc="training", disable=not accelerator.is_main_process)
    started = time.perf_counter()
    run.model.train()
    with progress, training_batches(run) as batches:
        while run.step < run.total_steps and not stop:
            values = training_step(run, batches)
            stop = values.pop("stop")
            rate = (run.step - first_step) * run.images_per_step / (time.perf_counter() - started)
            values |= {"learning_rate": run.lr_scheduler.get_last_lr()[0], "images_per_second": rate}
            values |= {"skipped_steps": run.history.skipped_steps}
            progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            progress.update()
            if args.report_to and run.step % args.logging_steps == 0:
                accelerator.log(values, step=run.step)
            if args.validation_steps and run.step % args.validation_steps == 0:
                preview(run, f"step-{run.step:06d}.png")
                measure_noise_levels(run)
            is_due = args.checkpointing_steps and run.step % args.checkpointing_steps == 0
            if is_due or stop:
                folder = run.save()
    if stop:
        accelerator.print(
            f"Stopped by {run.signals.name or 'a signal'} after step {run.step}; {folder} is complete. Go on with "
            "`--resume_from_checkpoint latest`."
        )
        accelerator.end_training()
    return not stop


@torch.no_grad()
def measure_noise_levels(run: Run):
    """
    The diffusion loss of the first batch at single noise levels, always from the same draws.

    The mean over all levels, which training shows, is mostly that of the easy ones and soon looks flat.
    """
    accelerator, online = run.accelerator, run.online
    place = accelerator.process_index, accelerator.num_processes
    batch = next(batch_loader(run.data.samples, run.args.train_batch_size, 0, *place, run.args.seed))
    inputs = model_inputs(run, batch, 0)
    draws, losses = inputs.pop("draws"), []
    run.model.eval()
    for level in NOISE_LEVELS:
        output = online(**inputs, draws=at_noise_level(draws, level, online.token_scheduler))
        losses.append(output.diffusion_loss.float())
    run.model.train()
    losses = accelerator.reduce(torch.stack(losses), "mean").tolist()
    run.history.noise_levels[run.step] = losses
    if run.args.report_to:
        named = {f"diffusion_loss_at_noise_{level}": loss for level, loss in zip(NOISE_LEVELS, losses, strict=True)}
        accelerator.log(named, step=run.step)


def preview(run: Run, name: str) -> DJEPAPipeline | None:
    """
    A labelled grid of the first classes from the moving average, from the same noise every time.

    Returns:
        [`DJEPAPipeline`]: that drew it; on the main process.
    """
    pipe = run.pipeline()  # by all processes: the weights may be spread over them
    if not run.accelerator.is_main_process:
        return None
    config = pipe.transformer.config
    labels = run.preview_labels()
    options = run.sampling.call_options(config.num_tokens)
    generator = torch.Generator().manual_seed(run.args.seed)
    images = pipe(labels, num_images_per_label=PREVIEW_IMAGES, generator=generator, **options).images
    starts = range(0, len(images), PREVIEW_IMAGES)
    rows = [(config.id2label[i], images[j : j + PREVIEW_IMAGES]) for i, j in zip(labels, starts, strict=True)]
    folder = run.output_dir / "previews"
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    labelled_grid(rows).save(folder / name)
    for place, i in enumerate(labels):
        images[place * PREVIEW_IMAGES].save(folder / "frames" / f"{run.step:08d}-{i:02d}.png")
    film_strip(folder / "frames").save(folder / "film_strip.png")
    return pipe


def publish(run: Run):
    """Writes the pipeline, with the moving average, a model card, a last preview and the loss curves."""
    run.accelerator.wait_for_everyone()
    pipe = preview(run, "final.png")
    if run.accelerator.is_main_process:
        pipe.save_pretrained(run.output_dir)
        options = run.sampling.call_options(pipe.transformer.config.num_tokens)
        card = create_model_card(
            pipe,
            str(run.output_dir),
            recipe(run),
            sampling=options,
            datasets=[run.data.source] if is_hub_id(run.data.source) else None,
            base_model=run.history.init_from if is_hub_id(run.history.init_from) else None,
        )
        card.save(run.output_dir / "README.md")
        parameters = pipe.transformer.num_parameters() / 1e6
        title = f"{pipe.transformer.config.objective}, {parameters:.1f}M parameters"
        losses = {name.replace("_", " "): values for name, values in run.history.losses.items()}
        plot_losses(list(range(1, run.step + 1)), losses, run.output_dir / "loss.png", title)
        if levels := run.history.noise_levels:
            by_level = dict(zip(NOISE_LEVELS, zip(*levels.values(), strict=True), strict=True))
            plot_noise_levels(list(levels), by_level, run.output_dir / "loss_by_noise_level.png", title)
        (run.output_dir / "sampling.yaml").write_text(yaml.safe_dump(asdict(run.sampling), sort_keys=False))
        print(f"The pipeline in {run.output_dir} holds the EMA weights after step {run.step}.")
    run.accelerator.wait_for_everyone()  # none takes its end of the connection down while another is at work
    run.accelerator.end_training()


def is_hub_id(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not Path(name).exists()


def recipe(run: Run) -> str:
    """What the model card says of the training, in Markdown."""
    args, history = run.args, run.history
    start = f" It started from the weights of `{history.init_from}`." if history.init_from else ""
    average = f"moving average with a decay of {args.ema_decay:g}, " if run.has_average else ""
    return (
        f"On {run.data.source}: {run.step:,} steps with a batch of {run.images_per_step}, AdamW with a peak learning "
        f"rate of {args.learning_rate:g} ({args.lr_scheduler}, {args.lr_warmup_steps:,} steps of warm-up), betas "
        f"{args.adam_beta1:g} and {args.adam_beta2:g}, weight decay rising from 0 to {args.adam_weight_decay:g}, "
        f"gradients clipped to {args.max_grad_norm:g}, {average}mixed precision {run.mixed_precision}.{start}"
    )


def show_plan(run: Run):
    """What a training run would do: sizes, cost, schedule, and the first batch as a picture."""
    args, model, accelerator = run.args, run.online, run.accelerator
    batch = next(batch_loader(run.data.samples, args.train_batch_size, 0, seed=args.seed))
    if not accelerator.is_main_process:
        return
    run.output_dir.mkdir(parents=True, exist_ok=True)
    sample = model_inputs(run, batch, 0)["sample"][:64]
    images = (decode_samples(sample, run.vae).float() / 2 + 0.5).clamp(0, 1)
    pictures = DJEPAPipeline.numpy_to_pil(images.movedim(1, -1).cpu().numpy())
    by_class: dict[str, list[Image.Image]] = {}
    for picture, label in zip(pictures, batch["class_labels"].tolist(), strict=False):
        by_class.setdefault(run.data.names[label].split(",")[0], []).append(picture)
    rows = [(name, pictures[:SHOWN_IMAGES]) for name, pictures in by_class.items()]
    labelled_grid(rows).save(run.output_dir / "first_batch.png")
    half = run.mixed_precision != "no"
    plan = cost_of_training(model, args.train_batch_size, run.images_per_step, half)
    plan["images per step"] = f"{run.images_per_step:,} on {accelerator.num_processes} process(es)"
    if not args.max_train_steps or not run.data.is_stream:
        plan["steps per epoch"] = f"{run.data.count_images() / run.images_per_step:,.1f}"
    plan["steps"] = f"{run.total_steps:,}"
    plan["peak learning rate"] = f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps:,} warm-up steps"
    plan["mixed precision"] = run.mixed_precision
    width = max(map(len, plan))
    print(yaml.safe_dump(json.loads(model.config.to_json_string(use_diff=True)), sort_keys=False)[:2000])
    print("\n".join(f"{name:<{width}}  {value}" for name, value in plan.items()))
    print(f"The first batch is in {run.output_dir / 'first_batch.png'}. Nothing was trained.")


def parse_options(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments, SamplingArguments]:
    kinds = (ModelArguments, DataArguments, TrainingArguments, SamplingArguments)
    return parse_arguments(*kinds, argv=argv, description=__doc__)


def main(argv: list[str] | None = None):
    run = prepare(*parse_options(argv))
    if run.args.dry_run:
        show_plan(run)
    elif train(run):
        publish(run)


if __name__ == "__main__":
    main()
