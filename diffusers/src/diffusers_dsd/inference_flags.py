"""The command line of dsd_infer.py: every flag with its unit and default."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_dsd.attention import check_paths
from diffusers_dsd.cli import non_negative_float, non_negative_int, positive_float, positive_int, settle_score
from diffusers_dsd.errors import DSDError
from diffusers_dsd.models import VERSIONS, default_model
from diffusers_dsd.scoring import SCORES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_inference_flags(
    description: str, benchmarks: Sequence[str], data_root: Path, argv: list[str] | None = None
) -> argparse.Namespace:
    """The flags of an evaluation, checked as far as they can be without the model and the data.

    Args:
        description: of the script.
        benchmarks: names that --val_data takes.
        data_root: default of --data_root.
        argv: the command line; None is the process's own.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _data_flags(parser.add_argument_group("benchmark").add_argument, benchmarks, data_root)
    _model_flags(parser.add_argument_group("model").add_argument)
    _score_flags(parser.add_argument_group("score").add_argument)
    _less_work_flags(parser.add_argument_group("less work").add_argument)
    _run_flags(parser.add_argument_group("run").add_argument)
    args = parser.parse_args(argv)

    if args.guidance_scale not in (0, 1):
        parser.error(
            f"--guidance_scale {args.guidance_scale}: a score compares unguided noise estimates, so leave it out."
        )
    if args.model and args.version:
        parser.error(f"--model {args.model} and --version {args.version} both choose a model: leave one out.")
    _settle_weights(parser, args)
    settle_score(parser, args)
    if args.layers and args.score == "denoising":
        parser.error("--layers are of the attention term, which --score denoising leaves out: leave one out.")
    if args.adaptive is not None and not 0.5 <= args.adaptive < 1:
        parser.error(f"--adaptive {args.adaptive}: choose a confidence from 0.5 up to, but not, 1, such as 0.95.")
    args.sampling_time_steps = 40 if args.sampling_time_steps is None else args.sampling_time_steps
    args.model = args.model or VERSIONS.get(args.version) or default_model(args.val_data)
    return args


def _settle_weights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what --weights decides themselves."""
    decided = {
        "--sampling_time_steps": args.sampling_time_steps is not None,
        "--score": args.score is not None,
        "--bias": args.bias,
        "--halves": args.halves != "auto",
        "--attention_weight": args.attention_weight is not None,
        "--untuned_denoising": args.untuned_denoising is not None,
        "--layers": args.layers is not None,
        "--adaptive": args.adaptive is not None,
    }
    if args.weights and any(decided.values()):
        flag = next(flag for flag, given in decided.items() if given)
        parser.error(f"--weights {args.weights} decide what {flag} does: leave one of the two out.")


def _paths(text: str) -> tuple[str, ...]:
    """An argparse type: some of down,mid,up."""
    try:
        return check_paths(text.split(","))
    except DSDError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rows(text: str) -> int | str:
    """An argparse type: "auto", or 1, 2, 3, …"""
    return text if text == "auto" else positive_int(text)


def _data_flags(add: Callable[..., Any], benchmarks: Sequence[str], data_root: Path) -> None:
    add(
        "--val_data",
        default="Shapes",
        metavar="NAME",
        help=f"one of {', '.join(benchmarks)} (default: Shapes)",
    )
    add(
        "--data_root",
        type=Path,
        default=data_root,
        metavar="DIR",
        help="folder that holds Visual_Genome, refcocog, vqav2, winoground (default: the folder this checkout is in)",
    )
    add("--limit", type=positive_int, metavar="N", help="take the first N items (default: all)")
    add(
        "--seed",
        type=non_negative_int,
        default=0,
        help="of the noise, the random wrong candidates and the drawn scenes (default: 0)",
    )


def _model_flags(add: Callable[..., Any]) -> None:
    add(
        "--model",
        metavar="NAME",
        help='a hub name, a folder, or "shapes-sd" (default: shapes-sd for Shapes, otherwise 2.1-base)',
    )
    add(
        "--version",
        choices=list(VERSIONS),
        help="short for --model with the weights of this Stable Diffusion",
    )
    add(
        "--output_dir",
        "--checkpoint",
        dest="checkpoint",
        type=Path,
        metavar="PATH",
        help="attention prompts to load: a checkpoint folder or file (default: none)",
    )
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights (default: accelerate's --mixed_precision, otherwise float16 on GPU and float32 on CPU)",
    )


def _score_flags(add: Callable[..., Any]) -> None:
    add(
        "--sampling_time_steps",
        "--sampling_steps",
        type=int,
        metavar="S",
        help="timesteps to average over, 1 to 1000 (default: 40)",
    )
    add(
        "--score",
        choices=SCORES,
        default=None,
        help="attention + denoising term, or one of them (default: hybrid)",
    )
    add("--bias", action="store_true", help="the attention term only: another name of --score attention")
    add(
        "--halves",
        choices=["auto", "both", "cond"],
        default="auto",
        help="attention of the text's own half, or averaged with the empty text's (default: as the checkpoint was "
        "trained, cond without one)",
    )
    add(
        "--attention_weight",
        type=non_negative_float,
        metavar="W",
        help="of the attention term in the hybrid score (default: as learned with the checkpoint, 1 without one)",
    )
    add(
        "--untuned_denoising",
        action=argparse.BooleanOptionalAction,
        help="compute the denoising term without the checkpoint, for one more UNet row per text (default: as the "
        "checkpoint was trained for)",
    )
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        metavar="1.0",
        help="kept from the original; a score compares unguided noise estimates, so only 1 (or 0) is accepted",
    )


def _less_work_flags(add: Callable[..., Any]) -> None:
    add(
        "--layers",
        type=_paths,
        metavar="PATHS",
        help="scored layers of the attention term, of down,mid,up (default: all); with --score attention and down,mid "
        "the UNet's up path is not computed, two thirds of its work",
    )
    add(
        "--adaptive",
        type=positive_float,
        metavar="CONFIDENCE",
        help="race an item's candidates: one that is behind at this confidence, such as 0.95, leaves (default: all "
        "candidates at all timesteps)",
    )
    add(
        "--weights",
        type=Path,
        metavar="PATH",
        help="learned weights of timesteps and layers: what benchmarks/timesteps.py wrote, or the folder it lies in "
        "(default: plain averages)",
    )


def _run_flags(add: Callable[..., Any]) -> None:
    add(
        "--batchsize",
        type=_rows,
        default="auto",
        metavar="ROWS",
        help="most rows (timestep, image, text) in one UNet call; it does not change the scores (default: auto, what "
        "the memory allows)",
    )
    add(
        "--cache_dir_features",
        type=Path,
        metavar="DIR",
        help="keep latents, prompt embeddings and the empty text's readings there for other runs; it grows with the "
        "benchmark (default: in memory, up to 1 GiB)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the UNet's transformer blocks (GPU): slower to start, faster calls",
    )
    add(
        "--results_dir",
        type=Path,
        metavar="DIR",
        help="where to write scores.jsonl and results.json (default: results/BENCHMARK-MODEL-TIME); the results of an "
        "earlier run of the same settings that are there are gone on with",
    )
    add(
        "--on_error",
        choices=["stop", "skip"],
        default="stop",
        help="what to do with an item whose picture or row cannot be read, or whose score is not a number: stop, or "
        "skip it, write down why, and go on (default: stop)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the newest results of the same settings in results/ (or those in --results_dir), and fail "
        "where there are none",
    )
