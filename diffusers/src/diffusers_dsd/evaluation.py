"""Scores the items of a benchmark, in one or several processes, into a results folder.

`dsd_infer.py` is this and a command line; `dsd_train.py` validates with it, so both give the same figures.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from diffusers_dsd.attention import PATHS
from diffusers_dsd.cli import in_every_process, wait_for_the_others
from diffusers_dsd.errors import DSDError
from diffusers_dsd.features import FeatureCache
from diffusers_dsd.item_records import Benchmark, ScoreSettings, item_groups, item_records, one_ahead, outcomes_of
from diffusers_dsd.metrics import Figure, summarise
from diffusers_dsd.pipeline import DSDPipeline
from diffusers_dsd.results import SCORES_NAME, ResultsFolder, load_records, versions
from diffusers_dsd.schedule import timestep_grid

_REASONS = 5  # for skipping items that results.json repeats


def evaluate(
    pipe: DSDPipeline,
    benchmark: Benchmark,
    how: ScoreSettings,
    folder: Path,
    accelerator: Accelerator,
    limit: int | None = None,
    settings: dict[str, Any] | None = None,
    features: Path | None = None,
    skip: bool = False,
) -> dict[str, Figure]:
    """Scores the benchmark's first items and writes scores.jsonl and results.json.

    Process k of n takes the items k, k+n, k+2n, … that the folder does not hold yet, and writes each as soon as it is
    scored; the main process puts them together.

    Args:
        pipe: the model, on this process's device.
        benchmark: the items.
        how: the score.
        folder: where to write, the same in every process.
        accelerator: knows the processes.
        limit: how many items (all where it is None).
        settings: what the scores depend on besides; a folder of other settings is refused.
        features: folder in which latents, prompt embeddings and readings of the empty text are kept for other runs.
        skip: record an item that cannot be scored with its reason and go on, instead of stopping; the figures are
            over the others.

    Returns:
        The figures by name in the main process, an empty dictionary in the others.

    Raises:
        ItemError: without `skip`, bad data or a score that is not a number.
        DSDError: a folder that cannot be written or is of other settings, or nothing could be scored.
    """
    total = min(len(benchmark), limit or len(benchmark))
    settings = run_settings(pipe, benchmark, how, limit, settings)
    # nobody writes before everybody has read what is done
    results, done, figures = in_every_process(accelerator, lambda: _open(folder, settings, total))
    if all(gather_object([figures is not None])):
        return figures if accelerator.is_main_process else {}

    start = time.perf_counter()
    _score_share(pipe, benchmark, how, results, done, total, accelerator, FeatureCache(folder=features), skip)
    wait_for_the_others(accelerator)
    if not accelerator.is_main_process:
        return {}

    seconds = time.perf_counter() - start
    results.merge(total)
    figures, skipped, reasons = _figures(benchmark, folder, how)
    results.write_summary(
        {
            "metrics": figures,
            "skipped": skipped,
            "skipped_reasons": reasons,
            "settings": settings,
            "run": {
                "batchsize": how.batch_size,
                "num_processes": accelerator.num_processes,
                "device": str(accelerator.device),
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            },
            "versions": versions(),
            **({} if how.adaptive is None else {"share_of_full_grid": _share_looked_at(folder, how)}),
            # of this run: an item that an earlier run had scored took no time now
            "seconds_per_item": seconds / (total - sum(done)) if total > sum(done) else None,
        }
    )
    return figures


def _score_share(
    pipe: DSDPipeline,
    benchmark: Benchmark,
    how: ScoreSettings,
    results: ResultsFolder,
    done: bytearray,
    total: int,
    accelerator: Accelerator,
    cache: FeatureCache,
    skip: bool,
) -> None:
    """Scores those of this process's items that are not done, and writes each as soon as it is scored."""
    shard = range(accelerator.process_index, total, accelerator.num_processes)
    before, show = sum(done[index] for index in shard), accelerator.is_main_process
    groups = one_ahead(item_groups(pipe, benchmark, shard, done, how, cache, skip))
    with tqdm(total=len(shard), initial=before, unit="item", disable=not show, desc=benchmark.name) as bar:
        right, scored = 0, 0
        for group in groups:
            for record in item_records(pipe, benchmark, group, how, cache, skip):
                results.append(record, shard=accelerator.process_index)
                right, scored = right + record.get("correct", False), scored + ("error" not in record)
            bar.update(len(group))
            bar.set_postfix_str(f"right {right / scored:.3f}" if scored else "nothing scored")
    results.close()


def run_settings(
    pipe: DSDPipeline, benchmark: Benchmark, how: ScoreSettings, limit: int | None, settings: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that the scores depend on, as a results folder records it (arguments as for `evaluate`)."""
    return {
        "val_data": benchmark.name,
        **(settings or {}),
        "sampling_time_steps": how.sampling_steps,
        "score": how.score,
        "halves": how.halves,
        "attention_weight": how.attention_weight,
        "untuned_denoising": how.untuned_denoising,
        # None where the score is the paper's
        "layers": None if how.layers == PATHS else how.layers,
        "weights": asdict(how.weights) if how.weights else None,
        "adaptive": how.adaptive,
        "seed": how.seed,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "limit": limit,
    }


def _open(
    folder: Path, settings: dict[str, Any], total: int
) -> tuple[ResultsFolder, bytearray, dict[str, Figure] | None]:
    """The results folder, which items it holds, and its figures if it is finished."""
    results = ResultsFolder(folder, settings)
    done = results.done(total)
    return results, done, results.finished_figures() if all(done) else None


def _figures(benchmark: Benchmark, folder: Path, how: ScoreSettings) -> tuple[dict[str, Figure], int, list[str]]:
    """The figures over the scored items of scores.jsonl, how many were skipped, and why the first of them were.

    Raises:
        DSDError: all were.
    """
    skipped, reasons = 0, []

    def scored() -> Iterator[tuple[dict[str, float], dict[str, str]]]:
        nonlocal skipped
        for record in load_records(folder / SCORES_NAME):
            if "error" in record:
                skipped += 1
                reasons.extend([record["error"]] if skipped <= _REASONS else [])
            else:
                yield outcomes_of(benchmark, record["scores"], record["label"], how), record["tags"]

    figures = summarise(scored())
    if skipped and not figures:
        raise DSDError(
            f"All {skipped} items of {benchmark.name} were skipped, so {folder} has no figures (the first: "
            f"{reasons[0].rstrip('.')}): mend that and choose another --results_dir."
        )
    return figures, skipped, reasons


def _share_looked_at(folder: Path, how: ScoreSettings) -> float:
    """How many of the full grid's looks at a candidate all races took together."""
    grid, looks, possible = len(timestep_grid(how.sampling_steps)), 0, 0
    for record in load_records(folder / SCORES_NAME):
        looked = record.get("looked", [])  # a skipped item has none
        looks += sum(looked)
        possible += grid * len(looked)
    return looks / possible
