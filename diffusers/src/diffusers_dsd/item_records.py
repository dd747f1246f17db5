"""From a benchmark's items to the lines of scores.jsonl, a group of items at a time."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from diffusers_dsd.attention import PATHS
from diffusers_dsd.errors import ItemError
from diffusers_dsd.features import FeatureCache
from diffusers_dsd.metrics import MAIN_FIGURE, item_outcomes
from diffusers_dsd.pipeline import DSDPipeline
from diffusers_dsd.racing import RaceOutcome, look_after
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


def item_groups(
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
    rows = 0.0
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
        sizes = len(item.images), len(item.texts)
        rows += share * num_rows(*sizes, how.sampling_steps, how.score, how.halves, how.untuned_denoising)
        if rows >= _FULL_BATCHES * how.batch_size:
            _encode_ahead(pipe, group, how, cache)
            yield group
            group, rows = {}, 0.0
    if group:
        _encode_ahead(pipe, group, how, cache)
        yield group


def _encode_ahead(
    pipe: DSDPipeline, group: dict[int, Item | ItemError], how: ScoreSettings, cache: FeatureCache
) -> None:
    items = [item for item in group.values() if not isinstance(item, ItemError)]
    images, texts = ([one for item in items for one in getattr(item, part)] for part in ("images", "texts"))
    pipe.encode_ahead(images, texts, how.batch_size, cache)


def item_records(
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
    outcomes = outcomes_of(benchmark, scores, item.label, how)
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


def outcomes_of(
    benchmark: Benchmark, scores: list[list[float]], label: int | None, how: ScoreSettings
) -> dict[str, float]:
    """What one item adds to each figure; a race knows its winner, and no other rank."""
    outcomes = item_outcomes(benchmark.metrics, scores, label)
    main = MAIN_FIGURE[benchmark.metrics]
    return outcomes if how.adaptive is None else {main: outcomes[main]}


def one_ahead(groups: Iterator[T]) -> Iterator[T]:
    """The same values; each is made in another thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, groups, None)
        while (group := following.result()) is not None:
            following = pool.submit(next, groups, None)
            yield group
