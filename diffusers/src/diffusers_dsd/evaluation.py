"""Scores the items of a benchmark, in one or several processes, into a results folder.

`dsd_infer.py` is this and a command line; `dsd_train.py` validates with it, so both give the same figures.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from diffusers_dsd.cli import in_every_process, wait_for_the_others
from diffusers_dsd.errors import DSDError
from diffusers_dsd.metrics import MAIN_FIGURE, Figure, item_outcomes, summarise
from diffusers_dsd.pipeline import DSDOutput, DSDPipeline
from diffusers_dsd.results import SCORES_NAME, ResultsFolder, load_records, versions
from diffusers_dsd.scoring import num_rows

_FULL_BATCHES = 8  # UNet calls that one group of items should fill, so that few are cut short


class Item(Protocol):
    """What is scored: every image against every text (see `custom_datasets.Item`)."""

    id: str
    texts: list[str]
    images: list[Any]
    image_ids: list[str]
    label: int | None
    tags: dict[str, str]


class Benchmark(Protocol):
    """A sequence of items (see `custom_datasets.MatchingDataset`)."""

    name: str
    metrics: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class ScoreSettings:
    """How pairs are scored: the arguments of `DSDPipeline.score` of the same names.

    Attributes:
        halves: "both" or "cond"; "auto" is resolved before.
        batch_size: most rows in one UNet call; no score depends on it.
        attention_weight: w of the hybrid score w·A + B.
        untuned_denoising: whether B leaves the attention prompts out.
    """

    sampling_steps: int
    score: str
    halves: str
    seed: int
    batch_size: int
    attention_weight: float = 1.0
    untuned_denoising: bool = False


def evaluate(
    pipe: DSDPipeline,
    benchmark: Benchmark,
    how: ScoreSettings,
    folder: Path,
    accelerator: Accelerator,
    limit: int | None = None,
    settings: dict[str, Any] | None = None,
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

    Returns:
        The figures by name in the main process, an empty dictionary in the others.

    Raises:
        DSDError: bad data, a score that is not a number, or a folder that cannot be written or is of other settings.
    """
    total = min(len(benchmark), limit or len(benchmark))
    settings = run_settings(pipe, benchmark, how, limit, settings)
    # nobody writes before everybody has read what is done
    results, done, figures = in_every_process(accelerator, lambda: _open(folder, settings, total))
    if all(gather_object([figures is not None])):
        return figures if accelerator.is_main_process else {}

    start, scored = time.perf_counter(), 0
    shard = range(accelerator.process_index, total, accelerator.num_processes)
    before = sum(done[index] for index in shard)
    show = {"unit": "item", "disable": not accelerator.is_main_process, "desc": benchmark.name}
    with tqdm(total=len(shard), initial=before, **show) as bar:
        right = 0
        for group in _groups(benchmark, shard, done, how):
            outputs = pipe.score_items(
                [(item.images, item.texts) for item in group.values()],
                **asdict(how),
                names=[f"{item.id} of {benchmark.name}" for item in group.values()],
            )
            for (index, item), output in zip(group.items(), outputs, strict=True):
                record = _record(benchmark, index, item, output)
                results.append(record, shard=accelerator.process_index)
                right, scored = right + record["correct"], scored + 1
            bar.update(len(group))
            bar.set_postfix_str(f"right {right / scored:.3f}")
    results.close()
    wait_for_the_others(accelerator)
    if not accelerator.is_main_process:
        return {}

    seconds = time.perf_counter() - start
    results.merge(total)
    figures = summarise(
        (item_outcomes(benchmark.metrics, record["scores"], record["label"]), record["tags"])
        for record in load_records(folder / SCORES_NAME)
    )
    results.write_summary(
        {
            "metrics": figures,
            "settings": settings,
            "run": {
                "batchsize": how.batch_size,
                "num_processes": accelerator.num_processes,
                "device": str(accelerator.device),
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            },
            "versions": versions(),
            # of this run: an item that an earlier run had scored took no time now
            "seconds_per_item": seconds / (total - sum(done)) if total > sum(done) else None,
        }
    )
    return figures


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


def _groups(benchmark: Benchmark, shard: range, done: bytearray, how: ScoreSettings) -> Iterator[dict[int, Item]]:
    """The items of a shard that are not done, by index, a few at a time so that UNet calls are full."""
    group, rows = {}, 0
    for index in shard:
        if done[index]:  # not even opened: a resumed run should not read what it does not score
            continue
        item = benchmark[index]
        group[index] = item
        sizes = len(item.images), len(item.texts)
        rows += num_rows(*sizes, how.sampling_steps, how.score, how.halves, how.untuned_denoising)
        if rows >= _FULL_BATCHES * how.batch_size:
            yield group
            group, rows = {}, 0
    if group:
        yield group


def _record(benchmark: Benchmark, index: int, item: Item, output: DSDOutput) -> dict[str, Any]:
    """One line of scores.jsonl; scores are lists over images of lists over texts.

    Raises:
        DSDError: a score is not a number.
    """
    if not output.scores.isfinite().all():
        raise DSDError(
            f"The score of item {item.id} of {benchmark.name} is not a number: use float32 or bfloat16, and check the "
            f"model's weights."
        )
    scores = output.scores.tolist()
    outcomes = item_outcomes(benchmark.metrics, scores, item.label)
    return {
        "index": index,
        "id": item.id,
        "label": item.label,
        "texts": item.texts,
        "images": item.image_ids,
        "scores": scores,
        "attention": None if output.attention is None else output.attention.tolist(),
        "denoising": None if output.denoising is None else output.denoising.tolist(),
        "correct": bool(outcomes[MAIN_FIGURE[benchmark.metrics]]),
        "tags": item.tags,
    }
