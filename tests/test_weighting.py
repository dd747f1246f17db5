"""The learned weight between the two terms."""

import pytest
import torch

from diffusers_dsd.weighting import fit_attention_weight


def right_first(terms: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """(examples, m) in any order -> each example's right candidate first."""
    return [
        [row[label], *row[:label], *row[label + 1 :]]
        for row, label in zip(terms.tolist(), labels.tolist(), strict=True)
    ]


def test_it_finds_the_weight_that_the_labels_were_made_with():
    generator = torch.Generator().manual_seed(0)
    attention = 0.01 * torch.randn(2000, 5, generator=generator)
    denoising = 3 * torch.randn(2000, 5, generator=generator)
    gumbel = -torch.log(-torch.log(torch.rand(2000, 5, generator=generator)))
    labels = (200 * attention + 0.5 * denoising + gumbel).argmax(1)
    weight = fit_attention_weight(right_first(attention, labels), right_first(denoising, labels))
    assert weight == pytest.approx(400, rel=0.15)


def test_a_term_that_misleads_counts_nothing():
    right = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    labels = right.argmax(1)
    good, bad = right_first(right, labels), right_first(-right, labels)
    assert fit_attention_weight(bad, good) == pytest.approx(0, abs=1e-3)
    assert fit_attention_weight(good, bad) > 1e3


def test_a_term_that_adds_nothing_to_a_perfect_one_counts_little():
    generator = torch.Generator().manual_seed(0)
    perfect = torch.rand(100, 2, generator=generator) + torch.tensor([2.0, 0.0])
    fair = torch.randn(100, 2, generator=generator) + torch.tensor([1.0, 0.0])
    assert fit_attention_weight(fair.tolist(), perfect.tolist()) < 0.2
