"""How much the attention term should count in the hybrid score w·A + B, learned from training items."""

from collections.abc import Sequence

import torch

from diffusers_dsd.pipeline import DSDOutput

_RIDGE = 1e-3  # keeps the fit finite where a term tells all items apart
_LARGEST = 1e4  # "the attention term alone", near enough


def fit_attention_weight(outputs: Sequence[DSDOutput], labels: Sequence[int]) -> float:
    """The w ≥ 0 with which w·A + B ranks right candidates best: a logistic regression on paired differences.

    Each wrong candidate of an item gives one difference (right minus wrong) in A and in B; the two coefficients, not
    negative, minimise the mean logistic loss, and w is their ratio (Bradley-Terry with two features).

    Args:
        outputs: scores of items with both terms; each has one image or one text.
        labels: index of each item's right candidate.
    """
    differences = []
    for output, label in zip(outputs, labels, strict=True):
        assert output.attention is not None and output.denoising is not None
        terms = torch.stack([output.attention.flatten(), output.denoising.flatten()], dim=1).double()  # (m, 2)
        wrong = torch.arange(len(terms)) != label
        differences.append((terms[label] - terms[wrong]) / wrong.sum() ** 0.5)  # items count alike
    features = torch.cat(differences)  # (pairs, 2)
    scale = features.square().mean(0).sqrt().clamp_min(1e-12)
    roots = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)  # squared, so that none is negative
    optimizer = torch.optim.LBFGS([roots], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margins = (features / scale) @ roots.square()  # (pairs,)
        value = torch.nn.functional.softplus(-margins).mean() + _RIDGE * roots.pow(4).sum()
        value.backward()
        return value

    optimizer.step(loss)
    attention, denoising = (roots.detach().square() / scale).tolist()
    return min(attention / max(denoising, 1e-12), _LARGEST)
