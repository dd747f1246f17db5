"""Races: the full grid's decision for less work, and never with another winner more often than was agreed."""

import random

import numpy as np
import pytest
import torch

from benchmarks.adaptive import race
from diffusers_dsd import DSDError
from diffusers_dsd.racing import Race, covering_order, look_after
from diffusers_dsd.schedule import timestep_grid
from models import tiny_pipeline
from test_scoring import TEXTS, pictures


def test_the_order_covers_the_range_early():
    grid = timestep_grid(40)
    order = covering_order(grid, seed=3)
    assert sorted(order) == grid and order == covering_order(grid, seed=3) != covering_order(grid, seed=4)
    for parts in (2, 4, 8):
        quantiles = sorted(grid.index(timestep) * parts // len(grid) for timestep in order[:parts])
        assert quantiles == list(range(parts)), f"one of each of {parts} parts"


@pytest.mark.parametrize(("timesteps", "looks"), [(40, [4, 6, 8, 12, 16, 24, 32, 40]), (5, [4, 5]), (3, [3]), (1, [1])])
def test_looks(timesteps, looks):
    assert look_after(timesteps) == looks


def test_a_clear_leader_wins_early_and_a_tie_takes_the_whole_grid():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 3))
    grid = timestep_grid(40)
    early = race(noise + np.array([0, 50, 0]), grid, 0.95, seed=0)
    assert early.winner == 1 and max(early.looked) == 4
    assert early.scores[1] == 0 and max(early.scores[0], early.scores[2]) < -40
    late = race(noise[:, [0, 0, 0]], grid, 0.95, seed=0)
    assert late.looked == [40] * 3 and late.scores == [0.0] * 3


def test_a_race_that_nobody_leaves_is_the_full_grid():
    scores = np.random.default_rng(1).normal(size=(10, 4))
    outcome = race(scores, timestep_grid(10), 1 - 1e-12, seed=0)
    assert outcome.winner == scores.mean(0).argmax() and outcome.looked == [10] * 4
    np.testing.assert_allclose(outcome.scores, scores.mean(0) - scores.mean(0).max(), atol=1e-12)


@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_winners_are_the_full_grids_as_often_as_agreed(confidence):
    """2000 hard races: differences that drift over the timesteps, candidates close together."""
    rng, grid, equal, looked = np.random.default_rng(5), timestep_grid(40), 0, 0
    for number in range(2000):
        drift = np.linspace(0, 1, 40)[:, None] * rng.normal(size=5)
        scores = rng.normal(size=(40, 5)) + drift + 0.5 * rng.normal(size=5)
        outcome = race(scores, grid, confidence, seed=number)
        equal += outcome.winner == scores.mean(0).argmax()
        looked += sum(outcome.looked)
    assert equal / 2000 >= confidence
    assert looked < 0.95 * 2000 * 5 * 40, "and something is saved"


def test_bad_races():
    with pytest.raises(DSDError, match="two candidates"):
        Race(1, 40, 0.95)
    with pytest.raises(DSDError, match="not a number"):
        Race(2, 40, 0.95).look([[1.0, float("nan")], [0.0, 0.0]])
    pipe = tiny_pipeline()
    with pytest.raises(DSDError, match="confidence is 1"):
        pipe.race_items([(pictures(2), TEXTS[:1])], confidence=1)
    with pytest.raises(DSDError, match="races either"):
        pipe.race_items([(pictures(2), TEXTS[:2])])


@pytest.mark.parametrize("score", ["hybrid", "attention", "denoising"])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_pipeline_races_on_the_scores_of_the_full_grid(score, kind):
    pipe = tiny_pipeline()
    items = [(pictures(3), TEXTS[:1]), (pictures(2), TEXTS[1:2])]
    if kind == "texts":
        items = [(pictures(1), TEXTS), (pictures(2)[1:], TEXTS[:2])]
    how = dict(sampling_steps=20, score=score, halves="both", seed=2)
    rows = []
    outcomes = pipe.race_items(items, confidence=0.6, on_batch=rows.append, **how)
    full_rows = []
    full = pipe.score_items(items, on_batch=full_rows.append, **how)
    for outcome, output in zip(outcomes, full, strict=True):
        replayed = race(output.per_timestep.flatten(1).numpy(), output.timesteps, 0.6, seed=2)
        assert (outcome.winner, outcome.looked) == (replayed.winner, replayed.looked)
        assert outcome.scores == pytest.approx(replayed.scores, abs=1e-5)
    assert sum(rows) < sum(full_rows)


def test_candidates_leave_and_the_others_go_on(monkeypatch):
    contest = Race(4, 40, 0.95)
    rng = random.Random(0)
    contest.look([[rng.gauss(mean, 0.1) for _ in range(4)] for mean in (0, 5, 5.01, 0)])
    assert contest.alive == [1, 2] and not contest.is_over
    contest.look([[1.0, 1.1], [9.0, 9.2]])
    assert torch.tensor([len(seen) for seen in contest._seen]).tolist() == [4, 6, 6, 4]
