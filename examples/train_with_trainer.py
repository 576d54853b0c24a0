#!/usr/bin/env python
"""D-JEPA under `transformers.Trainer`, for who has a training loop around it already.

    python examples/train_with_trainer.py --output_dir outputs/trainer --max_steps 500

[`DJEPAForPreTraining`] returns a loss like any other model. Two things are to know: the moving average is moved by a
callback after every step, and what is published is made from it. The options are those of `TrainingArguments`; the
optimizer is AdamW as in the published recipe.
"""

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAPipeline, FlowMatchTokenScheduler
from djepa_hf.data import ImageToSample, load_digits
from djepa_hf.optimization import ema_decay, parameter_groups


class MoveAverage(TrainerCallback):
    """Moves the EMA copy after every optimizer step; smaller decays come first, to forget the random start."""

    def __init__(self, decay: float):
        self.decay = decay

    def on_step_end(self, args, state, control, model: DJEPAForPreTraining, **kwargs):
        model.update_target(ema_decay(self.decay, state.global_step))


def main(argv: list[str] | None = None):
    (args,) = HfArgumentParser(TrainingArguments, description=__doc__).parse_args_into_dataclasses(argv)
    args.remove_unused_columns = False  # the images become samples only when they are read
    digits, to_sample = load_digits("train"), ImageToSample(8, 1)
    digits.set_transform(
        lambda rows: {"sample": [to_sample(image) for image in rows["image"]], "class_labels": rows["label"]}
    )
    config = DJEPAConfig(
        sample_size=8,
        patch_size=2,
        num_channels=1,
        id2label=dict(enumerate(digits.features["label"].names)),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_buffer_tokens=4,
        denoiser_hidden_size=256,
        denoiser_num_hidden_layers=2,
        objective="flow_matching",
        mask_ratio_min=0.05,
        mask_ratio_std=0.5,
    )
    model = DJEPAForPreTraining(config)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.02)
    trainer = Trainer(model, args, train_dataset=digits, callbacks=[MoveAverage(0.995)], optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        DJEPAPipeline(model.export("ema"), FlowMatchTokenScheduler()).save_pretrained(args.output_dir)
        print(f"The pipeline in {args.output_dir} holds the EMA weights.")


if __name__ == "__main__":
    main()
