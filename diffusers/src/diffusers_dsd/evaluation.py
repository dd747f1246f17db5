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
from diffusers_dsd.errors import DSDError
from diffusers_dsd.features import FeatureCache
from diffusers_dsd.metrics import MAIN_FIGURE, Figure, item_outcomes, summarise
from diffusers_dsd.pipeline import DSDPipeline
from diffusers_dsd.racing import RaceOutcome, look_after
from diffusers_dsd.results import SCORES_NAME, ResultsFolder, load_records, versions
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.scoring import num_rows
from diffusers_dsd.timestep_weights import TimestepWeights

T = TypeVar("T")
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
    cache = FeatureCache(folder=features)
    shard = range(accelerator.process_index, total, accelerator.num_processes)
    before = sum(done[index] for index in shard)
    show = {"unit": "item", "disable": not accelerator.is_main_process, "desc": benchmark.name}
    with tqdm(total=len(shard), initial=before, **show) as bar:
        right = 0
        for group in one_ahead(_groups(pipe, benchmark, shard, done, how, cache)):
            for record in _records(pipe, benchmark, group, how, cache):
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
        (_outcomes(benchmark, record["scores"], record["label"], how), record["tags"])
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
    pipe: DSDPipeline, benchmark: Benchmark, shard: range, done: bytearray, how: ScoreSettings, cache: FeatureCache
) -> Iterator[dict[int, Item]]:
    """The items of a shard that are not done, by index, a few at a time so that UNet calls are full."""
    group, rows = {}, 0.0
    # a race looks at few timesteps at a time
    share = 1 if how.adaptive is None else look_after(how.sampling_steps)[0] / how.sampling_steps
    for index in shard:
        if done[index]:  # not even opened: a resumed run should not read what it does not score
            continue
        item = benchmark[index]
        group[index] = item
        sizes = len(item.images), len(item.texts)
        rows += share * num_rows(*sizes, how.sampling_steps, how.score, how.halves, how.untuned_denoising)
        if rows >= _FULL_BATCHES * how.batch_size:
            pipe.decode_ahead([image for item in group.values() for image in item.images], cache)
            yield group
            group, rows = {}, 0.0
    if group:
        yield group


def _records(
    pipe: DSDPipeline, benchmark: Benchmark, group: dict[int, Item], how: ScoreSettings, cache: FeatureCache
) -> Iterator[dict[str, Any]]:
    """The lines of scores.jsonl of a group of items; scores are lists over images of lists over texts.

    Raises:
        DSDError: a score is not a number.
    """
    outputs: list[Any] = (pipe.score_items if how.adaptive is None else pipe.race_items)(
        [(item.images, item.texts) for item in group.values()],
        **how.arguments(),
        cache=cache,
        names=[f"{item.id} of {benchmark.name}" for item in group.values()],
    )
    for (index, item), output in zip(group.items(), outputs, strict=True):
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
        if not all(math.isfinite(score) for row in scores for score in row):
            raise DSDError(
                f"The score of item {item.id} of {benchmark.name} is not a number: use float32 or bfloat16, and check "
                f"the model's weights."
            )
        outcomes = _outcomes(benchmark, scores, item.label, how)
        yield {
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
        looks += sum(record["looked"])
        possible += grid * len(record["looked"])
    return looks / possible


def one_ahead(groups: Iterator[T]) -> Iterator[T]:
    """The same values; each is made in another thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, groups, None)
        while (group := following.result()) is not None:
            following = pool.submit(next, groups, None)
            yield group
