"""The command line of dsd_train.py: every flag with its unit and default."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers.optimization import SchedulerType

from diffusers_dsd.checkpoints import BEST_NAME
from diffusers_dsd.cli import non_negative_float, non_negative_int, positive_float, positive_int, settle_score
from diffusers_dsd.scoring import HALVES, SCORES

TRACKERS = ("tensorboard", "wandb", "comet_ml")


def parse_training_flags(
    description: str, benchmarks: Sequence[str], data_root: Path, argv: list[str] | None = None
) -> argparse.Namespace:
    """The flags of a training, checked as far as they can be without the data.

    Args:
        description: of the script.
        benchmarks: names that --train_data takes.
        data_root: default of --data_root.
        argv: the command line; None is the process's own.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    _model_flags(parser.add_argument_group("model").add_argument)
    _data_flags(parser.add_argument_group("data").add_argument, benchmarks, data_root)
    _loss_flags(parser.add_argument_group("loss").add_argument)
    _optimization_flags(parser.add_argument_group("optimization").add_argument)
    _run_flags(parser.add_argument_group("checkpoints, validation, logs").add_argument)
    args = parser.parse_args(argv)

    settle_score(parser, args)
    if args.validation and not (args.val_data or args.use_validation_split):
        parser.error("--validation needs held-out items: give --val_data or --use_validation_split.")
    if args.untuned_denoising and args.score != "attention":
        parser.error(f"--untuned_denoising leaves nothing of --score {args.score} to train: give --score attention.")
    for beta in ("adam_beta1", "adam_beta2"):
        if getattr(args, beta) >= 1:
            parser.error(f"--{beta} {getattr(args, beta)}: choose a number below 1.")
    return args


def _model_flags(add: Callable[..., Any]) -> None:
    add(
        "--pretrained_model_name_or_path",
        "--model",
        dest="model",
        default="shapes-sd",
        metavar="NAME",
        help='a hub name, a folder, or "shapes-sd" (default: shapes-sd)',
    )
    add("--revision", metavar="NAME", help="branch, tag or commit of the model on the hub")
    add("--cache_dir", type=Path, metavar="DIR", help="where downloaded models are kept (default: the hub's cache)")
    add("--tokenizer", metavar="DIR", help="folder of another tokenizer of the same vocabulary (default: the model's)")
    add(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        help="what the UNet predicts (default: as the model's scheduler says)",
    )
    add("--rank", type=positive_int, default=4, help="of the low-rank updates (default: 4)")


def _data_flags(add: Callable[..., Any], benchmarks: Sequence[str], data_root: Path) -> None:
    add("--train_data", default="Shapes", metavar="NAME", help=f"one of {', '.join(benchmarks)} (default: Shapes)")
    add("--val_data", metavar="NAME", help="benchmark to evaluate at the end, and for --validation (default: none)")
    add(
        "--data_root",
        type=Path,
        default=data_root,
        metavar="DIR",
        help="folder that holds Visual_Genome, refcocog, vqav2 (default: the folder this checkout is in)",
    )
    add(
        "--max_train_samples",
        type=positive_int,
        metavar="N",
        help="take the first N training items (default: all of the benchmark's few-shot share)",
    )
    add(
        "--resolution",
        type=positive_int,
        metavar="PIXELS",
        help="width and height of the images (default: the model's own)",
    )
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="processes that read images (default: 0, the main one)",
    )


def _loss_flags(add: Callable[..., Any]) -> None:
    add("--score", choices=SCORES, help="the score to train (default: hybrid)")
    add("--bias", action="store_true", help="train the attention term only: another name of --score attention")
    add(
        "--halves",
        choices=HALVES,
        default="cond",
        help="attention of the text's own half, or averaged with the empty text's (default: cond)",
    )
    add("--margin", type=non_negative_float, default=0.1, help="how far the right pair should be ahead (default: 0.1)")
    add(
        "--independent_noise",
        action="store_true",
        help="another timestep and noise for every candidate, as in the original (default: shared by an item's)",
    )
    add(
        "--fit_attention_weight",
        type=non_negative_int,
        default=0,
        metavar="ITEMS",
        help="keep the last so many training items apart, and learn from them at the end how much the attention term "
        "counts in the hybrid score (default: 0, it counts 1)",
    )
    add(
        "--untuned_denoising",
        action="store_true",
        help="with --score attention: note that hybrid scores take their denoising term from the model without prompts",
    )
    add(
        "--noise_offset",
        type=non_negative_float,
        default=0.0,
        help="deviation of noise added to each channel as a whole (default: 0)",
    )


def _optimization_flags(add: Callable[..., Any]) -> None:
    add(
        "--num_train_epochs",
        type=positive_int,
        default=1,
        metavar="N",
        help="passes over the training items (default: 1)",
    )
    add(
        "--max_train_steps",
        type=positive_int,
        metavar="N",
        help="optimizer steps, whatever the number of epochs (default: as the epochs give)",
    )
    add(
        "--train_batch_size",
        type=positive_int,
        default=1,
        metavar="ITEMS",
        help="items per process that go through the UNet together (default: 1)",
    )
    add(
        "--val_batch_size",
        type=positive_int,
        default=16,
        metavar="ROWS",
        help="most rows in a UNet call without gradient (default: 16)",
    )
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        metavar="N",
        help="batches in one optimizer step (default: 1)",
    )
    add("--gradient_checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--learning_rate", type=positive_float, default=1e-4, help="(default: 1e-4)")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the items in one optimizer step")
    add(
        "--lr_scheduler",
        choices=[kind.value for kind in SchedulerType if kind.value != "piecewise_constant"],
        default="constant",
        help="(default: constant)",
    )
    add(
        "--lr_warmup_steps",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="steps in which the rate rises (default: 0)",
    )
    add("--use_8bit_adam", action="store_true", help="bitsandbytes' 8-bit AdamW (GPU)")
    add("--adam_beta1", type=non_negative_float, default=0.9, help="(default: 0.9)")
    add("--adam_beta2", type=non_negative_float, default=0.999, help="(default: 0.999)")
    add("--adam_weight_decay", type=non_negative_float, default=1e-2, help="(default: 0.01)")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="(default: 1e-8)")
    add("--max_grad_norm", type=positive_float, default=1.0, help="longer gradients are shortened to this (default: 1)")
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="of the frozen weights; the prompts stay float32 (default: accelerate's, otherwise no)",
    )
    add("--allow_tf32", action="store_true", help="TF32 matrix products on NVIDIA GPUs: faster, 3 digits")
    add(
        "--seed",
        type=non_negative_int,
        default=0,
        help="of prompts, order, timesteps, noise, drawn scenes (default: 0)",
    )


def _run_flags(add: Callable[..., Any]) -> None:
    add("--output_dir", type=Path, default=Path("output"), metavar="DIR", help="where checkpoints go (default: output)")
    add(
        "--checkpointing_steps",
        type=positive_int,
        default=500,
        metavar="N",
        help="steps between checkpoints (default: 500)",
    )
    add("--checkpoints_total_limit", type=positive_int, metavar="N", help="keep the newest N (default: all)")
    add(
        "--resume_from_checkpoint",
        metavar="PATH",
        help='go on from a checkpoint folder, or from "latest" in --output_dir',
    )
    add("--validation", action="store_true", help=f"evaluate held-out items between, and keep the best as {BEST_NAME}")
    add(
        "--validation_epochs",
        type=positive_int,
        default=1,
        metavar="N",
        help="validate at every N-th checkpoint (default: 1)",
    )
    add(
        "--val_num",
        type=positive_int,
        default=100,
        metavar="ITEMS",
        help="held-out items to validate with (default: 100)",
    )
    add(
        "--use_validation_split",
        action="store_true",
        help="validate with the last --val_num training items, which are then not trained on (default: with the first "
        "of --val_data)",
    )
    add(
        "--sampling_time_steps",
        type=int,
        default=40,
        metavar="S",
        help="timesteps of every evaluation, 1 to 1000 (default: 40)",
    )
    add("--report_to", choices=[*TRACKERS, "all", "none"], default="tensorboard", help="(default: tensorboard)")
    add("--logging_dir", default="logs", metavar="DIR", help="of the trackers, in --output_dir (default: logs)")
    add("--push_to_hub", action="store_true", help="upload the final checkpoint with a model card")
    add("--hub_model_id", metavar="NAME", help="repository to upload to (default: the name of --output_dir)")
    add("--hub_token", metavar="TOKEN", help="(default: what `hf auth login` stored)")
