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
from dataclasses import replace
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
from diffusers_dsd.attention import PATHS
from diffusers_dsd.batching import auto_batch_size
from diffusers_dsd.cli import (
    ends_in_a_sentence,
    in_every_process,
    make_accelerator,
)
from diffusers_dsd.errors import DSDError
from diffusers_dsd.evaluation import evaluate, run_settings
from diffusers_dsd.inference_flags import DTYPES, parse_inference_flags
from diffusers_dsd.item_records import ScoreSettings
from diffusers_dsd.metrics import format_table
from diffusers_dsd.models import compile_blocks, load_pipeline
from diffusers_dsd.results import RESULTS_NAME, SETTINGS_NAME, find_results, sha256
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.timestep_weights import read_weights

ROOT = Path(__file__).resolve().parent
WAIT = timedelta(days=7)  # for the slowest process's share; without a word, GPUs would wait ten minutes and give up


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_inference_flags(__doc__ or "", list(BENCHMARKS), ROOT.parent, argv)


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
        layers=args.layers or PATHS,
        weights=weights,
        adaptive=args.adaptive,
    )
    # files may hold something else when a run goes on than when it began
    prompts = [pipe.attention_prompts.path] if pipe.attention_prompts else []
    digests = in_every_process(accelerator, lambda: (sha256(*prompts), sha256(*benchmark.files)))
    sources = {
        "model": args.model,
        "checkpoint": str(args.checkpoint) if args.checkpoint else None,
        "checkpoint_sha256": digests[0],
        "annotations_sha256": digests[1],
    }
    settings = run_settings(pipe, benchmark, how, args.limit, sources)
    # the main process chooses: the others' clocks and disks may differ
    chosen = in_every_process(
        accelerator, lambda: str(results_folder(args, settings)) if accelerator.is_main_process else ""
    )
    folder = Path(broadcast_object_list([chosen])[0])
    skip = args.on_error == "skip"
    figures = evaluate(pipe, benchmark, how, folder, accelerator, args.limit, sources, args.cache_dir_features, skip)
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
    # The benchmark is read first: a missing file should not wait for gigabytes of weights.
    benchmark = get_dataset(args.val_data, args.data_root, seed=args.seed)
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
    benchmark.settings = replace(benchmark.settings, resize=pipe.resolution)
    return pipe, benchmark


if __name__ == "__main__":
    main()
