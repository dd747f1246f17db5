"""Scores the items of a benchmark, in one or several processes, into a results folder.

`dsd_infer.py` is this and a command line; `dsd_train.py` validates with it, so both give the same figures.
"""

import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from diffusers_dsd.attention import PATHS
from diffusers_dsd.cli import in_every_process, wait_for_the_others
from diffusers_dsd.errors import DSDError, ItemError
from diffusers_dsd.features import FeatureCache
from diffusers_dsd.metrics import MAIN_FIGURE, Figure, item_outcomes, summarise
from diffusers_dsd.pipeline import DSDPipeline
from diffusers_dsd.racing import RaceOutcome, look_after
from diffusers_dsd.results import SCORES_NAME, ResultsFolder, load_records, versions
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.scoring import num_rows
from diffusers_dsd.timestep_weights import TimestepWeights

T = TypeVar("T")
_REASONS = 5  # for skipping items that results.json repeats
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
        layers: the attention term's paths, of "down", "mid" and "up".
        weights: learned weights of timesteps and layers, which then decide all the above but the seed.
        adaptive: confidence of races (see `racing`) in the place of the full grid's scores.
    """

    sampling_steps: int
    score: str
    halves: str
    seed: int
    batch_size: int
    attention_weight: float = 1.0
    untuned_denoising: bool = False
    layers: tuple[str, ...] = PATHS
    weights: TimestepWeights | None = None
    adaptive: float | None = None

    def arguments(self) -> dict[str, Any]:
        """What `DSDPipeline.score_items` (or, for an adaptive score, `race_items`) is called with."""
        arguments = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        arguments["confidence"] = arguments.pop("adaptive")
        del arguments["confidence" if self.adaptive is None else "weights"]
        return arguments


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

    start, scored = time.perf_counter(), 0
    cache = FeatureCache(folder=features)
    shard = range(accelerator.process_index, total, accelerator.num_processes)
    before = sum(done[index] for index in shard)
    show = {"unit": "item", "disable": not accelerator.is_main_process, "desc": benchmark.name}
    with tqdm(total=len(shard), initial=before, **show) as bar:
        right = 0
        for group in one_ahead(_groups(pipe, benchmark, shard, done, how, cache, skip)):
            for record in _records(pipe, benchmark, group, how, cache, skip):
                results.append(record, shard=accelerator.process_index)
                right, scored = right + record.get("correct", False), scored + ("error" not in record)
            bar.update(len(group))
            bar.set_postfix_str(f"right {right / scored:.3f}" if scored else "nothing scored")
    results.close()
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


def _groups(
    pipe: DSDPipeline,
    benchmark: Benchmark,
    shard: range,
    done: bytearray,
    how: ScoreSettings,
    cache: FeatureCache,
    skip: bool,
) -> Iterator[dict[int, Item | ItemError]]:
    """The items of a shard that are not done, by index, a few at a time so that UNet calls are full.

    With `skip`, what is wrong with an item takes its place.
    """
    group: dict[int, Item | ItemError] = {}
    images, rows = [], 0.0
    # a race looks at few timesteps at a time
    share = 1 if how.adaptive is None else look_after(how.sampling_steps)[0] / how.sampling_steps
    for index in shard:
        if done[index]:  # not even opened: a resumed run should not read what it does not score
            continue
        try:
            group[index] = item = benchmark[index]
        except ItemError as error:
            if not skip:
                raise
            group[index] = error
            rows += 1  # so that thousands of them in a row do not wait to be written
            continue
        images += item.images
        sizes = len(item.images), len(item.texts)
        rows += share * num_rows(*sizes, how.sampling_steps, how.score, how.halves, how.untuned_denoising)
        if rows >= _FULL_BATCHES * how.batch_size:
            pipe.decode_ahead(images, cache)
            yield group
            group, images, rows = {}, [], 0.0
    if group:
        yield group


def _records(
    pipe: DSDPipeline,
    benchmark: Benchmark,
    group: dict[int, Item | ItemError],
    how: ScoreSettings,
    cache: FeatureCache,
    skip: bool,
) -> Iterator[dict[str, Any]]:
    """The lines of scores.jsonl of a group of items, in its order; with `skip`, also of those that cannot be scored.

    Raises:
        ItemError: without `skip`, an image cannot be read or a score is not a number.
    """
    items = {index: item for index, item in group.items() if not isinstance(item, ItemError)}
    outputs = dict(zip(items, _outputs(pipe, benchmark, list(items.values()), how, cache, skip), strict=True))
    for index, item in group.items():
        try:
            if isinstance(item, ItemError):
                raise item
            record = _record(benchmark, index, item, outputs[index], how)
        except ItemError as error:
            if not skip:
                raise
            record = {"index": index, "id": getattr(item, "id", error.item_id), "error": str(error)}
        yield record


def _outputs(
    pipe: DSDPipeline, benchmark: Benchmark, items: list[Item], how: ScoreSettings, cache: FeatureCache, skip: bool
) -> list[Any]:
    """What the pipeline says of each item; with `skip`, an `ItemError` where it cannot."""
    if not items:
        return []
    try:
        return (pipe.score_items if how.adaptive is None else pipe.race_items)(
            [(item.images, item.texts) for item in items],
            **how.arguments(),
            cache=cache,
            names=[f"{item.id} of {benchmark.name}" for item in items],
        )
    except ItemError as error:
        if not skip:
            raise
        if len(items) > 1:  # the others are not to blame
            return [output for item in items for output in _outputs(pipe, benchmark, [item], how, cache, skip)]
        cache.discard(items[0].images, pipe.resolution)
        return [error]


def _record(benchmark: Benchmark, index: int, item: Item, output: Any, how: ScoreSettings) -> dict[str, Any]:
    """An item's line of scores.jsonl; scores are lists over images of lists over texts.

    Raises:
        ItemError: the item could not be scored, or a score is not a number.
    """
    if isinstance(output, ItemError):
        raise output
    if isinstance(output, RaceOutcome):
        one_image = len(item.images) == 1
        scores = [output.scores] if one_image else [[score] for score in output.scores]
        terms = {"attention": None, "denoising": None, "looked": output.looked}
    else:
        scores = output.scores.tolist()
        terms = {
            "attention": None if output.attention is None else output.attention.tolist(),
            "denoising": None if output.denoising is None else output.denoising.tolist(),
        }
    # the sum of two terms may be a number where they are not, and JSON has no word for that
    matrices = [scores, *(terms[name] for name in ("attention", "denoising") if terms[name] is not None)]
    if not all(math.isfinite(score) for matrix in matrices for row in matrix for score in row):
        raise ItemError(
            f"The score of item {item.id} of {benchmark.name} is not a number: use float32 or bfloat16, and check "
            f"the model's weights."
        )
    outcomes = _outcomes(benchmark, scores, item.label, how)
    return {
        "index": index,
        "id": item.id,
        "label": item.label,
        "texts": item.texts,
        "images": item.image_ids,
        "scores": scores,
        **terms,
        "correct": bool(outcomes[MAIN_FIGURE[benchmark.metrics]]),
        "tags": item.tags,
    }


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
                yield _outcomes(benchmark, record["scores"], record["label"], how), record["tags"]

    figures = summarise(scored())
    if skipped and not figures:
        raise DSDError(
            f"All {skipped} items of {benchmark.name} were skipped, so {folder} has no figures (the first: "
            f"{reasons[0].rstrip('.')}): mend that and choose another --results_dir."
        )
    return figures, skipped, reasons


def _outcomes(
    benchmark: Benchmark, scores: list[list[float]], label: int | None, how: ScoreSettings
) -> dict[str, float]:
    """What one item adds to each figure; a race knows its winner, and no other rank."""
    outcomes = item_outcomes(benchmark.metrics, scores, label)
    main = MAIN_FIGURE[benchmark.metrics]
    return outcomes if how.adaptive is None else {main: outcomes[main]}


def _share_looked_at(folder: Path, how: ScoreSettings) -> float:
    """How many of the full grid's looks at a candidate all races took together."""
    grid, looks, possible = len(timestep_grid(how.sampling_steps)), 0, 0
    for record in load_records(folder / SCORES_NAME):
        looked = record.get("looked", [])  # a skipped item has none
        looks += sum(looked)
        possible += grid * len(looked)
    return looks / possible


def one_ahead(groups: Iterator[T]) -> Iterator[T]:
    """The same values; each is made in another thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, groups, None)
        while (group := following.result()) is not None:
            following = pool.submit(next, groups, None)
            yield group
