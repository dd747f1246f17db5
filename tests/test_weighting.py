"""The learned weight between the two terms."""

import pytest
import torch

from diffusers_dsd import DSDOutput
from diffusers_dsd.weighting import fit_attention_weight


def outputs(attention, denoising):
    return [
        DSDOutput(scores=None, attention=a, denoising=d, per_timestep=None, timesteps=[])
        for a, d in zip(attention, denoising, strict=True)
    ]


def test_it_finds_the_weight_that_the_labels_were_made_with():
    generator = torch.Generator().manual_seed(0)
    attention = 0.01 * torch.randn(2000, 5, 1, generator=generator)
    denoising = 3 * torch.randn(2000, 5, 1, generator=generator)
    gumbel = -torch.log(-torch.log(torch.rand(2000, 5, 1, generator=generator)))
    labels = (200 * attention + 0.5 * denoising + gumbel).flatten(1).argmax(1).tolist()
    assert fit_attention_weight(outputs(attention, denoising), labels) == pytest.approx(400, rel=0.15)


def test_a_term_that_misleads_counts_nothing():
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(500, 1, 2, generator=generator)
    labels = right.flatten(1).argmax(1).tolist()
    assert fit_attention_weight(outputs(-right, right), labels) == pytest.approx(0, abs=1e-3)
    assert fit_attention_weight(outputs(right, -right), labels) > 1e3
