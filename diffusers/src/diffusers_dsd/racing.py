"""Same decision, less work: the candidates of an item race over timesteps, and one that is clearly behind leaves.

The decision of the full grid is which candidate has the highest mean over its T timesteps. A race looks at the
timesteps in a random order that covers the range early and stops to compare at a few looks. After k timesteps the
differences between the leader's scores and another candidate's, at the same timesteps with the same noise, are k draws
without replacement from the T differences whose mean decides. The candidate leaves when that mean is above 0 by a
one-sided t-test with the finite population's correction:

    mean(d) > q · sd(d) · sqrt((1 - k/T) / k),    q the 1 - α quantile of Student's t

α = (1 - confidence) / (looks · (candidates - 1)): Bonferroni over the looks and over who may wrongly be the leader, so
the full grid's winner leaves with a probability of at most 1 - confidence, as far as the differences are normal. The
order is stratified, so the mean varies less than that of plain random draws would, and the test errs on the safe side.

Few timesteps say little of a spread, but n candidates say it n times: sd(d) is the larger of the pair's own and the one
pooled over all candidates that are left (a randomised block design: what is common to a timestep is taken out), and t
has the latter's (k - 1)(n - 1) degrees of freedom. For two candidates that is the paired t-test.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from diffusers_dsd.errors import DSDError, ItemError

_FIRST_LOOK = 4  # timesteps: with fewer a t-test knows next to nothing of the spread
_BEHIND = -1e-12  # score of a candidate that left, relative to the winner's, at most


@dataclass(frozen=True)
class RaceOutcome:
    """How a race ended.

    Attributes:
        winner: index of the candidate that is left, or of the best where the grid was exhausted.
        scores: of each candidate the mean difference to the winner over the timesteps it was looked at: 0 for the
            winner, below 0 for those that left. Those that stayed to the end have the full grid's differences.
        looked: at how many timesteps each candidate was looked at.
    """

    winner: int
    scores: list[float]
    looked: list[int]


class Race:
    """One item's candidates.

    Args:
        candidates: how many there are, at least 2.
        timesteps: T of the full grid.
        confidence: that the winner is the full grid's, 0 … 1.

    Raises:
        DSDError: fewer than two candidates.
    """

    def __init__(self, candidates: int, timesteps: int, confidence: float) -> None:
        if candidates < 2:
            raise DSDError("A race needs at least two candidates: leave --adaptive out.")
        self.timesteps = timesteps
        self.alive = list(range(candidates))
        looks = len([look for look in look_after(timesteps) if look < timesteps])
        self.alpha = (1 - confidence) / (max(looks, 1) * (candidates - 1))
        self._seen: list[list[float]] = [[] for _ in range(candidates)]

    @property
    def is_over(self) -> bool:
        """Whether one candidate is left, or the grid is exhausted."""
        return len(self.alive) == 1 or len(self._seen[self.alive[0]]) == self.timesteps

    def look(self, scores: Sequence[Sequence[float]]) -> None:
        """Adds the scores of the candidates that are left, a list over them of lists over new timesteps.

        Raises:
            ItemError: a score is not a number.
        """
        for candidate, new in zip(self.alive, scores, strict=True):
            self._seen[candidate] += new
        seen = np.array([self._seen[candidate] for candidate in self.alive])  # (left, k)
        if not np.isfinite(seen).all():
            raise ItemError("A score is not a number: use float32 or bfloat16, and check the model's weights.")
        k = seen.shape[1]
        if k >= self.timesteps or len(self.alive) == 1:
            return
        differences = seen[seen.mean(1).argmax()] - seen  # (left, k)
        residuals = seen - seen.mean(0) - seen.mean(1, keepdims=True) + seen.mean()  # (left, k)
        freedom = (k - 1) * (len(seen) - 1)
        pooled = np.sqrt(2 * np.square(residuals).sum() / freedom)  # of a difference of two candidates
        spread = np.maximum(differences.std(1, ddof=1), pooled) * np.sqrt((1 - k / self.timesteps) / k)
        behind = differences.mean(1) > student_t.isf(self.alpha, freedom) * spread
        self.alive = [candidate for candidate, left in zip(self.alive, behind, strict=True) if not left]

    def outcome(self) -> RaceOutcome:
        """The winner, of a race that is over."""
        winner = max(self.alive, key=lambda candidate: np.mean(self._seen[candidate]))
        scores = []
        for candidate, seen in enumerate(self._seen):
            difference = float(np.mean(np.array(seen) - np.array(self._seen[winner][: len(seen)])))
            scores.append(difference if candidate in self.alive else min(difference, _BEHIND))
        return RaceOutcome(winner, scores, [len(seen) for seen in self._seen])


def look_after(timesteps: int) -> list[int]:
    """After how many timesteps a race over a grid of T compares: 4, 6, 8, 12, 16, 24, …, T."""
    looks, steps = [], [_FIRST_LOOK, _FIRST_LOOK * 3 // 2]
    while steps[0] < timesteps:
        looks.append(steps.pop(0))
        steps.append(looks[-1] * 2)
    return [*looks, timesteps]


def covering_order(timesteps: Sequence[int], seed: int) -> list[int]:
    """A random order whose first 2, 4, 8, … have one of each half, quarter, eighth, … of the grid."""
    return _covering(list(timesteps), random.Random(f"race {seed}"))


def _covering(values: list[int], rng: random.Random) -> list[int]:
    if len(values) < 2:
        return values
    middle = len(values) // 2
    halves = [_covering(values[:middle], rng), _covering(values[middle:], rng)]
    rng.shuffle(halves)
    return [value for value in chain.from_iterable(zip_longest(*halves)) if value is not None]


def run_races(
    prepared: Any, timesteps: Sequence[int], score: str, attention_weight: float, confidence: float
) -> list[RaceOutcome]:
    """Races the candidates of all items at once, so that UNet calls stay full while candidates leave.

    Args:
        prepared: the items (`PreparedItems`), each of several images and one text or of one image and several texts.
        timesteps: the full grid.
        score: "hybrid", "attention" or "denoising".
        attention_weight: w of the hybrid score.
        confidence: as for `Race`.

    Raises:
        DSDError: an item without a choice to make, or a score that is not a number.
    """
    races = [Race(len(pairs), len(timesteps), confidence) for pairs in prepared.pairs]
    # What the empty text reads is the same for all texts of an image, so it decides nothing between them.
    relative = all(len({image for image, _ in pairs}) == 1 for pairs in prepared.pairs)
    order, start = covering_order(timesteps, prepared.seed), 0
    for stop in look_after(len(timesteps)):
        left = [(race, pairs) for race, pairs in zip(races, prepared.pairs, strict=True) if not race.is_over]
        pairs = [item_pairs[candidate] for race, item_pairs in left for candidate in race.alive]
        if not pairs:
            break
        terms = prepared.score(pairs, order[start:stop], score, relative=relative)
        columns = iter(terms.total(attention_weight).T.tolist())  # of each pair its new scores
        for race, _ in left:
            race.look([next(columns) for _ in race.alive])
        start = stop
    return [race.outcome() for race in races]
