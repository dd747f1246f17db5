"""What a score gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput


@dataclass
class DSDOutput(BaseOutput):
    """Scores of n images against m texts, all float32 on the CPU.

    Attributes:
        scores: s, (n, m): the mean over timesteps. Higher is a better match.
        attention: the term A of s, (n, m), or None where the score has none.
        denoising: the term B of s, (n, m), or None where the score has none.
        per_timestep: s_t, (T, n, m), in the order of `timesteps`.
        timesteps: the T timesteps, ascending.
    """

    scores: torch.Tensor
    attention: torch.Tensor | None
    denoising: torch.Tensor | None
    per_timestep: torch.Tensor
    timesteps: list[int]

    @classmethod
    def of_item(
        cls,
        timesteps: list[int],
        images: Sequence[Any],
        texts: Sequence[str],
        part: slice,
        *terms: torch.Tensor | None,
    ) -> "DSDOutput":
        """One item's part of the attention, denoising and total score, each (T, pairs) or None."""
        attention, denoising, total = (
            None if term is None else term[:, part].reshape(len(timesteps), len(images), len(texts)) for term in terms
        )
        assert total is not None
        return cls(
            scores=total.mean(0).float(),
            attention=None if attention is None else attention.mean(0).float(),
            denoising=None if denoising is None else denoising.mean(0).float(),
            per_timestep=total.float(),
            timesteps=timesteps,
        )
