"""Evaluates a diffusion model as an image-text matcher on a benchmark.

    accelerate launch dsd_infer.py                                         # the bundled model on Shapes
    accelerate launch dsd_infer.py --val_data ComVG_obj --sampling_time_steps 40 --output_dir CHECKPOINT

Every process takes every n-th item and writes what it scored line by line; the first one puts the lines together
and computes the figures. `--help` lists the flags.
"""

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of optional packages that no score needs

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from diffusers.utils.logging import disable_progress_bar

from custom_datasets import BENCHMARKS, MatchingDataset, get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.attention import PATHS, check_paths
from diffusers_dsd.batching import auto_batch_size
from diffusers_dsd.cli import (
    ends_in_a_sentence,
    in_every_process,
    make_accelerator,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    settle_score,
)
from diffusers_dsd.errors import DSDError
from diffusers_dsd.evaluation import evaluate, run_settings
from diffusers_dsd.item_records import ScoreSettings
from diffusers_dsd.metrics import format_table
from diffusers_dsd.models import VERSIONS, compile_blocks, default_model, load_pipeline
from diffusers_dsd.results import RESULTS_NAME, SETTINGS_NAME, find_results
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.scoring import SCORES
from diffusers_dsd.timestep_weights import read_weights

ROOT = Path(__file__).resolve().parent
WAIT = timedelta(days=7)  # for the slowest process's share; without a word, GPUs would wait ten minutes and give up
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("benchmark")
    data.add_argument(
        "--val_data",
        default="Shapes",
        metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS)} (default: Shapes)",
    )
    data.add_argument(
        "--data_root",
        type=Path,
        default=ROOT.parent,
        metavar="DIR",
        help="folder that holds Visual_Genome, refcocog, vqav2, winoground (default: the folder this checkout is in)",
    )
    data.add_argument("--limit", type=positive_int, metavar="N", help="take the first N items (default: all)")
    data.add_argument(
        "--seed",
        type=non_negative_int,
        default=0,
        help="of the noise, the random wrong candidates and the drawn scenes (default: 0)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help='a hub name, a folder, or "shapes-sd" (default: shapes-sd for Shapes, otherwise 2.1-base)',
    )
    model.add_argument(
        "--version",
        choices=list(VERSIONS),
        help="short for --model with the weights of this Stable Diffusion",
    )
    model.add_argument(
        "--output_dir",
        "--checkpoint",
        dest="checkpoint",
        type=Path,
        metavar="PATH",
        help="attention prompts to load: a checkpoint folder or file (default: none)",
    )
    model.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights (default: accelerate's --mixed_precision, otherwise float16 on GPU and float32 on CPU)",
    )

    score = parser.add_argument_group("score")
    score.add_argument(
        "--sampling_time_steps",
        "--sampling_steps",
        type=int,
        metavar="S",
        help="timesteps to average over, 1 to 1000 (default: 40)",
    )
    score.add_argument(
        "--score",
        choices=SCORES,
        default=None,
        help="attention + denoising term, or one of them (default: hybrid)",
    )
    score.add_argument("--bias", action="store_true", help="the attention term only: another name of --score attention")
    score.add_argument(
        "--halves",
        choices=["auto", "both", "cond"],
        default="auto",
        help="attention of the text's own half, or averaged with the empty text's (default: as the checkpoint was "
        "trained, cond without one)",
    )
    score.add_argument(
        "--attention_weight",
        type=non_negative_float,
        metavar="W",
        help="of the attention term in the hybrid score (default: as learned with the checkpoint, 1 without one)",
    )
    score.add_argument(
        "--untuned_denoising",
        action=argparse.BooleanOptionalAction,
        help="compute the denoising term without the checkpoint, for one more UNet row per text (default: as the "
        "checkpoint was trained for)",
    )
    score.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        metavar="1.0",
        help="kept from the original; a score compares unguided noise estimates, so only 1 (or 0) is accepted",
    )

    less = parser.add_argument_group("less work")
    less.add_argument(
        "--layers",
        type=lambda text: tuple(text.split(",")),
        metavar="PATHS",
        help="scored layers of the attention term, of down,mid,up (default: all); with --score attention and down,mid "
        "the UNet's up path is not computed, two thirds of its work",
    )
    less.add_argument(
        "--adaptive",
        type=positive_float,
        metavar="CONFIDENCE",
        help="race an item's candidates: one that is behind at this confidence, such as 0.95, leaves (default: all "
        "candidates at all timesteps)",
    )
    less.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="learned weights of timesteps and layers: what benchmarks/timesteps.py wrote, or the folder it lies in "
        "(default: plain averages)",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--batchsize",
        type=lambda text: text if text == "auto" else positive_int(text),
        default="auto",
        metavar="ROWS",
        help="most rows (timestep, image, text) in one UNet call; it does not change the scores (default: auto, what "
        "the memory allows)",
    )
    run.add_argument(
        "--cache_dir_features",
        type=Path,
        metavar="DIR",
        help="keep latents, prompt embeddings and the empty text's readings there for other runs; it grows with the "
        "benchmark (default: in memory, up to 1 GiB)",
    )
    run.add_argument(
        "--compile",
        action="store_true",
        help="compile the UNet's transformer blocks (GPU): slower to start, faster calls",
    )
    run.add_argument(
        "--results_dir",
        type=Path,
        metavar="DIR",
        help="where to write scores.jsonl and results.json (default: results/BENCHMARK-MODEL-TIME); the results of an "
        "earlier run of the same settings that are there are gone on with",
    )
    run.add_argument(
        "--on_error",
        choices=["stop", "skip"],
        default="stop",
        help="what to do with an item whose picture or row cannot be read, or whose score is not a number: stop, or "
        "skip it, write down why, and go on (default: stop)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with the newest results of the same settings in results/ (or those in --results_dir), and fail "
        "where there are none",
    )
    args = parser.parse_args(argv)

    if args.guidance_scale not in (0, 1):
        parser.error(
            f"--guidance_scale {args.guidance_scale}: a score compares unguided noise estimates, so leave it out."
        )
    if args.model and args.version:
        parser.error(f"--model {args.model} and --version {args.version} both choose a model: leave one out.")
    settle_weights(parser, args)
    settle_score(parser, args)
    if args.layers and args.score == "denoising":
        parser.error("--layers are of the attention term, which --score denoising leaves out: leave one out.")
    if args.adaptive is not None and not 0.5 <= args.adaptive < 1:
        parser.error(f"--adaptive {args.adaptive}: choose a confidence from 0.5 up to, but not, 1, such as 0.95.")
    args.sampling_time_steps = 40 if args.sampling_time_steps is None else args.sampling_time_steps
    args.model = args.model or VERSIONS.get(args.version) or default_model(args.val_data)
    return args


def settle_weights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
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


def main() -> None:
    args = parse_args()
    with ends_in_a_sentence("dsd_infer.py"):
        run(args, make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)]))


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Scores this process's share of the benchmark's items; the main process writes and prints the figures."""
    weights = in_every_process(accelerator, lambda: read_weights(args.weights) if args.weights else None)
    pipe, benchmark = in_every_process(accelerator, lambda: load(args, accelerator))
    how = ScoreSettings(
        sampling_steps=len(weights.timesteps) if weights else args.sampling_time_steps,
        score=args.score,
        halves=pipe.resolve_halves(args.halves),
        seed=args.seed,
        batch_size=auto_batch_size(pipe) if args.batchsize == "auto" else args.batchsize,
        attention_weight=pipe.resolve_attention_weight(args.attention_weight),
        untuned_denoising=pipe.resolve_untuned_denoising(args.untuned_denoising),
        layers=check_paths(args.layers or PATHS),
        weights=weights,
        adaptive=args.adaptive,
    )
    model = {"model": args.model, "checkpoint": str(args.checkpoint) if args.checkpoint else None}
    settings = run_settings(pipe, benchmark, how, args.limit, model)
    # the main process chooses: the others' clocks and disks may differ
    chosen = in_every_process(
        accelerator, lambda: str(results_folder(args, settings)) if accelerator.is_main_process else ""
    )
    folder = Path(broadcast_object_list([chosen])[0])
    skip = args.on_error == "skip"
    figures = evaluate(pipe, benchmark, how, folder, accelerator, args.limit, model, args.cache_dir_features, skip)
    if accelerator.is_main_process:
        score = "weighted" if args.weights else args.score
        print(f"{benchmark.name}, {score} score, seed {args.seed}")
        print(format_table(figures))
        written = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
        if skipped := written.get("skipped"):
            print(f"Skipped {skipped} items, which no figure counts; the first: {written['skipped_reasons'][0]}")
        if args.adaptive is not None:
            share = written["share_of_full_grid"]
            print(f"The races looked at {share:.1%} of the full grid (--adaptive {args.adaptive}).")
        print(f"Scores of every item and results.json are in {folder}")
    accelerator.end_training()


def results_folder(args: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Where to write: --results_dir, or a folder of its own in results/; with --resume one that an earlier run began.

    Raises:
        DSDError: there is nothing to resume.
    """
    if args.resume and not args.results_dir:
        return find_results(ROOT / "results", settings)
    if args.resume and not (args.results_dir / SETTINGS_NAME).is_file():
        raise DSDError(
            f"--resume: there is nothing to resume in {args.results_dir}: leave --resume out to start there."
        )
    name = "-".join([settings["val_data"], Path(args.model).name, time.strftime("%Y%m%d-%H%M%S")])
    return args.results_dir or ROOT / "results" / name


def load(args: argparse.Namespace, accelerator: Accelerator) -> tuple[DSDPipeline, MatchingDataset]:
    """The model on this process's device, and the benchmark at the model's resolution."""
    timestep_grid(args.sampling_time_steps)
    # The benchmark is read first as well: a missing file should not wait for gigabytes of weights.
    get_dataset(args.val_data, args.data_root, seed=args.seed)
    dtype = DTYPES.get(args.dtype) or DTYPES.get(
        {"fp16": "float16", "bf16": "bfloat16"}.get(accelerator.mixed_precision, ""),
        torch.float16 if accelerator.device.type == "cuda" else torch.float32,
    )
    if not accelerator.is_main_process:
        disable_progress_bar()
    pipe = load_pipeline(args.model, dtype)
    if args.checkpoint:
        pipe.load_attention_prompts(args.checkpoint)
    pipe.to(accelerator.device)
    if accelerator.device.type == "cuda":  # on CPUs it gains nothing, and float32 GroupNorm loses digits there
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if args.compile:
        compile_blocks(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe, get_dataset(args.val_data, args.data_root, resize=pipe.resolution, seed=args.seed)


if __name__ == "__main__":
    main()
