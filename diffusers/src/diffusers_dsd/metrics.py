"""Figures of merit: one outcome per item, then their mean with a 95 % interval over items."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

import numpy as np

from diffusers_dsd.errors import DSDError

Metric = Literal["accuracy", "recall", "winoground"]
MAIN_FIGURE = {"accuracy": "accuracy", "recall": "recall@1", "winoground": "group_score"}
_RESAMPLES = 10_000
_Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution


class Figure(TypedDict):
    """A mean over n items with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def rank_of(scores: Sequence[float], label: int) -> int:
    """How many wrong candidates are not beaten by the right one: 0 is best, and a tie is not a win.

    Args:
        scores: one of each candidate.
        label: index of the right one.

    Raises:
        DSDError: a score is not a number.
    """
    if any(math.isnan(score) for score in scores):
        raise DSDError("A score is not a number, so nothing can be ranked.")
    return sum(score >= scores[label] for i, score in enumerate(scores) if i != label)


def item_outcomes(metric: Metric, scores: Sequence[Sequence[float]], label: int | None) -> dict[str, float]:
    """What one item adds to each figure, 0 or 1.

    Args:
        metric: "accuracy"; "recall" (recall@1 and recall@5); or "winoground" (arXiv 2204.03162, equations 1-3).
        scores: a list over images of lists over texts; one of the two has length 1, but for winoground's 2 × 2.
        label: index of the right image or text; None for winoground, where text i belongs to image i.

    Raises:
        DSDError: a score is not a number, or the label is not the index of a candidate.
    """
    flat = [score for row in scores for score in row]
    if metric == "winoground":
        (s00, s01), (s10, s11) = scores
        rank_of(flat, 0)  # refuses NaN
        text = s00 > s01 and s11 > s10  # each image prefers its own caption
        image = s00 > s10 and s11 > s01  # each caption prefers its own image
        return {"text_score": float(text), "image_score": float(image), "group_score": float(text and image)}
    if label is None or not 0 <= label < len(flat):
        raise DSDError(f"The label of an item is {label}, which is none of its {len(flat)} candidates.")
    rank = rank_of(flat, label)
    if metric == "recall":
        return {"recall@1": float(rank < 1), "recall@5": float(rank < 5)}
    return {"accuracy": float(rank < 1)}


def bootstrap_interval(right: int, n: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a share, resampling the n items 10,000 times.

    The number of right items among n drawn with replacement is binomial, so it is drawn as such: exact, and flat in
    memory. Where all items are right (or all wrong) every resample is alike and the bootstrap says nothing; there
    the Wilson score interval is returned, whose other end is near 1 - 3.84/n.

    Args:
        right: how many of the n items are right.
        n: at least 1.
        seed: of the resampling.
    """
    if 0 < right < n:
        shares = np.random.default_rng(seed).binomial(n, right / n, _RESAMPLES) / n
        low, high = np.quantile(shares, [0.025, 0.975])
        return float(low), float(high)
    bound = n / (n + _Z95**2)
    return (bound, 1.0) if right else (0.0, 1 - bound)


def summarise(items: Iterable[tuple[dict[str, float], dict[str, str]]]) -> dict[str, Figure]:
    """Every figure over all items, and apart for each value of a tag that items differ in.

    Args:
        items: outcomes (0 or 1 by figure's name, as `item_outcomes` gives them) and tags of each item.

    Returns:
        Figures by name: "accuracy", and "accuracy/change=axis" for the items with this tag. An empty dictionary
        where there are no items.
    """
    counts: dict[tuple[str, str], list[int]] = {}  # (figure, tag) -> [right, n]
    values: dict[str, set[str]] = {}
    for outcomes, tags in items:
        for tag, value in tags.items():
            values.setdefault(tag, set()).add(value)
        for figure, outcome in outcomes.items():
            for group in ("", *(f"/{tag}={value}" for tag, value in tags.items())):
                count = counts.setdefault((figure, group), [0, 0])
                count[0] += int(outcome)
                count[1] += 1
    telling = {f"/{tag}={value}" for tag, found in values.items() if len(found) > 1 for value in found} | {""}
    figures: dict[str, Figure] = {}
    for (figure, group), (right, n) in sorted(counts.items(), key=lambda entry: entry[0][1] != ""):
        if group in telling:
            low, high = bootstrap_interval(right, n)
            figures[figure + group] = {"value": right / n, "low": low, "high": high, "n": n}
    return figures


def format_table(figures: dict[str, Figure]) -> str:
    """Figures as lines of text: name, value, 95 % interval, n."""
    width = max((len(name) for name in figures), default=0)
    lines = [f"{'':<{width}}   value   95 % interval        n"]
    for name, f in figures.items():
        lines.append(f"{name:<{width}}   {f['value']:.3f}   {f['low']:.3f} - {f['high']:.3f}  {f['n']:>7}")
    return "\n".join(lines)
