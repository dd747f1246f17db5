"""How much every timestep and scored layer counts, learned from few examples instead of averaged (see `--weights`)."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from diffusers_dsd.attention import PATHS
from diffusers_dsd.errors import DSDError, first_line
from diffusers_dsd.results import write_json
from diffusers_dsd.scoring import PairScores

FILE_NAME = "timestep_weights.json"


@dataclass(frozen=True)
class TimestepWeights:
    """s = Σ_t (Σ_l a[t, l]·A_l + b[t]·B) in the place of the plain averages over timesteps and layers.

    Attributes:
        timesteps: T of 0 … 999, ascending.
        attention: a, T lists of one number of 0 or more for each scored layer.
        denoising: b, T numbers of 0 or more.
        halves: "cond" or "both", of A.
        untuned_denoising: whether B leaves the attention prompts out.
        about: what they were fitted on, for the reader.
    """

    timesteps: list[int]
    attention: list[list[float]]
    denoising: list[float]
    halves: str = "cond"
    untuned_denoising: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.timesteps), len(self.attention), len(self.denoising)}
        numbers = [*self.denoising, *(number for row in self.attention for number in row)]
        if not (
            len(lengths) == 1
            and self.timesteps == sorted(set(self.timesteps))
            and all(isinstance(t, int) and 0 <= t < 1000 for t in self.timesteps)
            and all(isinstance(n, (int, float)) and 0 <= n < float("inf") for n in numbers)
            and len({len(row) for row in self.attention}) == 1
            and any(numbers)
            and self.halves in ("cond", "both")
            and isinstance(self.untuned_denoising, bool)
        ):
            raise ValueError("these are no weights of timesteps")

    def score_at(self, place: int) -> str:
        """Which score the place-th timestep needs: its cost depends on it."""
        if not any(self.attention[place]):
            return "denoising"
        return "hybrid" if self.denoising[place] else "attention"

    def check_layers(self, count: int, paths: tuple[str, ...]) -> None:
        """Raises DSDError unless the weights are for all `count` scored layers of a model."""
        if len(self.attention[0]) != count or paths != PATHS:
            raise DSDError(
                f"--weights are of {len(self.attention[0])} scored layers and this model has {count} in its "
                f"{', '.join(paths)} path: use the weights of this model, and no --layers."
            )

    def apply(self, terms: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
        """Both terms of the score at every timestep, weighted, each (T, P); their sum over T is the score."""
        attention = torch.tensor(self.attention, dtype=torch.float64)  # (T, L)
        denoising = torch.tensor(self.denoising, dtype=torch.float64)  # (T,)
        assert terms.layers is not None and terms.denoising is not None
        return (terms.layers * attention[:, None, :]).sum(-1), terms.denoising * denoising[:, None]

    def save(self, path: Path) -> None:
        """Writes the weights as JSON.

        Raises:
            DSDError: the file cannot be written.
        """
        write_json(path, asdict(self))


def read_weights(path: str | Path) -> TimestepWeights:
    """Reads what `TimestepWeights.save` wrote, from the file or from the folder it lies in.

    Raises:
        DSDError: there are no such weights.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return TimestepWeights(**values)
    except FileNotFoundError:
        raise DSDError(f"There are no weights {file}: make them with benchmarks/timesteps.py.") from None
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise DSDError(f"{file} does not hold weights of timesteps ({first_line(error)}): make them again.") from error


def fit_weights(examples: np.ndarray, penalty: float) -> np.ndarray:
    """Non-negative weights with which right candidates rank best: a logistic regression on paired differences.

    Every feature is scaled to unit root mean square for the fit, so that the L1 penalty treats them alike.

    Args:
        examples: right minus wrong candidate, (examples, T, L + 1): A of each of L scored layers, then B.
        penalty: of the sum of the scaled weights. It makes the weights of most features 0.

    Returns:
        Weights of the unscaled features, (T, L + 1).
    """
    features = examples.reshape(len(examples), -1)  # (examples, T * (L + 1))
    scale = np.sqrt(np.square(features).mean(0)).clip(1e-12)
    scaled = features / scale

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = scaled @ weights  # (examples,)
        value = np.logaddexp(0, -margins).mean() + penalty * weights.sum()
        return value, -(expit(-margins) @ scaled) / len(scaled) + penalty

    start = np.full(scaled.shape[1], 1 / scaled.shape[1])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    return (found.x / scale).reshape(examples.shape[1:])
