"""Figures by hand, and the intervals against what they promise."""

import numpy as np
import pytest

from diffusers_dsd import DSDError
from diffusers_dsd.metrics import bootstrap_interval, format_table, item_outcomes, rank_of, summarise


def test_ranks_and_ties():
    assert rank_of([3.0, 1.0, 2.0], 0) == 0
    assert rank_of([3.0, 1.0, 2.0], 1) == 2
    assert rank_of([3.0, 3.0, 2.0], 0) == 1, "a tie is not a win"
    assert rank_of([1.0] * 10, 4) == 9
    with pytest.raises(DSDError, match="not a number"):
        rank_of([float("nan"), 1.0], 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_accuracy_and_recall_of_one_row_or_one_column(transposed):
    scores = [5.0, 1.0, 6.0, 7.0, 8.0, 9.0]
    matrix = [[score] for score in scores] if transposed else [scores]
    assert item_outcomes("accuracy", matrix, 5) == {"accuracy": 1.0}
    assert item_outcomes("accuracy", matrix, 4) == {"accuracy": 0.0}
    assert item_outcomes("recall", matrix, 5) == {"recall@1": 1.0, "recall@5": 1.0}
    assert item_outcomes("recall", matrix, 0) == {"recall@1": 0.0, "recall@5": 1.0}
    assert item_outcomes("recall", matrix, 1) == {"recall@1": 0.0, "recall@5": 0.0}


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[2, 1], [1, 2]], 1, 1),
        ([[2, 1], [3, 4]], 1, 0),  # caption 0 prefers image 1
        ([[2, 3], [1, 4]], 0, 1),  # image 0 prefers caption 1
        ([[1, 2], [2, 1]], 0, 0),
        ([[2, 2], [1, 3]], 0, 1),  # a tie is not a win
        ([[2, 1], [2, 3]], 1, 0),
        ([[3, 1], [2, 2]], 0, 1),
        ([[3, 1], [0, 1]], 1, 0),
    ],
)
def test_winoground(scores, text, image):
    outcomes = item_outcomes("winoground", scores, None)
    assert outcomes == {"text_score": text, "image_score": image, "group_score": text * image}


def test_winoground_refuses_nan():
    with pytest.raises(DSDError, match="not a number"):
        item_outcomes("winoground", [[1.0, 0.0], [0.0, float("nan")]], None)


@pytest.mark.parametrize("label", [None, -1, 2])
def test_a_label_that_is_no_candidate_is_refused(label):
    with pytest.raises(DSDError, match=f"is {label}, which is none of its 2 candidates"):
        item_outcomes("accuracy", [[1.0, 2.0]], label)


def test_the_bootstrap_agrees_with_resampling_item_by_item():
    right, n = 45, 60
    outcomes = np.array([1.0] * right + [0.0] * (n - right))
    rng = np.random.default_rng(1)
    means = [rng.choice(outcomes, n).mean() for _ in range(10_000)]
    assert bootstrap_interval(right, n) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert bootstrap_interval(right, n) == bootstrap_interval(right, n)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_the_interval_covers_the_truth_as_often_as_it_says(share):
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(right, 500, seed=i) for i, right in enumerate(rng.binomial(500, share, 1000))]
    assert 0.92 < np.mean([low <= share <= high for low, high in intervals]) < 0.98


def test_all_right_is_not_certainty():
    low, high = bootstrap_interval(500, 500)
    assert high == 1 and low == pytest.approx(0.9924, abs=1e-4)
    assert bootstrap_interval(0, 500) == pytest.approx((0, 1 - low))


def test_figures_over_all_and_apart_by_telling_tags():
    items = [
        ({"accuracy": 1.0}, {"kind": "verb", "change": "axis"}),
        ({"accuracy": 0.0}, {"kind": "verb", "change": "opposite"}),
        ({"accuracy": 1.0}, {"kind": "verb", "change": "axis"}),
    ]
    figures = summarise(items)
    assert list(figures) == ["accuracy", "accuracy/change=axis", "accuracy/change=opposite"]
    assert figures["accuracy"]["value"] == pytest.approx(2 / 3) and figures["accuracy"]["n"] == 3
    assert figures["accuracy/change=axis"]["value"] == 1.0 and figures["accuracy/change=axis"]["n"] == 2
    table = format_table(figures)
    assert "0.667" in table and len(table.splitlines()) == 4
    assert summarise([]) == {}
