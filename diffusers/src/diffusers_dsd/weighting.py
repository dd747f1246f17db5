"""How much the attention term should count in the hybrid score w·A + B, learned from training items."""

from collections.abc import Sequence

import torch

# Keeps the fit finite where the terms tell all items apart. Weak, because a strong one would pull the two coefficients
# together there, and so give weight to a term that adds nothing.
_RIDGE = 1e-4
_LARGEST = 1e4  # "the attention term alone", near enough


def fit_attention_weight(attention: Sequence[Sequence[float]], denoising: Sequence[Sequence[float]]) -> float:
    """The w ≥ 0 with which w·A + B ranks right candidates best: a logistic regression on paired differences.

    Each wrong candidate of an example gives one difference (right minus wrong) in A and in B; the two coefficients,
    not negative, minimise the mean logistic loss, and w is their ratio (Bradley-Terry with two features).

    Args:
        attention: A of each example's candidates, the right one first.
        denoising: B of the same.
    """
    differences = []
    for candidates in zip(attention, denoising, strict=True):
        terms = torch.tensor(candidates, dtype=torch.float64).T  # (m, 2)
        differences.append((terms[0] - terms[1:]) / (len(terms) - 1) ** 0.5)  # examples count alike
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
    attention_share, denoising_share = (roots.detach().square() / scale).tolist()
    return min(attention_share / max(denoising_share, 1e-12), _LARGEST)
