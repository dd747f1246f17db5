"""Learning attention prompts: the hinge loss of arXiv 2305.10722 and its gradient at the cost of two candidates.

An example is a positive pair (image, text) and its negatives. Its loss is max(0, margin + max_neg s - s_pos), so only
the positive and the hardest negative carry gradient, and only where the margin is not met yet. All candidates are
therefore scored without gradient first; then the few rows that count go forward and backward.

A score is a sum of readings of UNet rows with fixed coefficients (scoring.py), and so is the gradient's objective:
rows that the positive and the hardest negative share with opposite signs, such as the empty text's of one image,
cancel and are not computed.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_dsd.attention import read_attention
from diffusers_dsd.denoiser import EpsilonDenoiser
from diffusers_dsd.schedule import NUM_TRAIN_TIMESTEPS
from diffusers_dsd.scoring import EMPTY, Draws, PromptEmbeddings, Row, chunks, measure
from diffusers_dsd.shared_prefix import RowGroups, share_prefix

Weights = dict[Row, tuple[float, float]]  # what A and ‖ε - ε̂‖ of each row count for


@dataclass(frozen=True)
class Example:
    """A positive and its negatives.

    Attributes:
        candidates: (image, text, draw) of each; the draw is the same for all of them, unless noise is independent.
        positive: index of the right one.
        name: of the item, for messages.
    """

    candidates: list[Row]
    positive: int
    name: str = ""


@dataclass(frozen=True)
class StepOutcome:
    """What one batch of examples gave, as sums over its examples, so that processes and batches add up.

    Attributes:
        loss: sum of the hinge losses.
        satisfied: how many examples score the positive above every negative.
        examples: how many there were.
        scores: of every candidate of every example.
    """

    loss: float
    satisfied: int
    examples: int
    scores: list[list[float]]


def draw_timestep_and_noise(
    seed: int, number: int, shape: tuple[int, ...], noise_offset: float = 0.0
) -> tuple[int, torch.Tensor]:
    """A random timestep, 0 … 999, and noise of `shape`, standard normal, float32 on the CPU.

    They depend on the arguments alone, so a resumed run and any number of processes draw the same.

    Args:
        seed: of the training.
        number: of the draw in the training.
        shape: of one latent, (C, h, w).
        noise_offset: standard deviation of what is added to each channel as a whole (Diffusers' `--noise_offset`).
    """
    # Seeding by a string mixes the two numbers, so neighbouring seeds and draws share nothing.
    generator = torch.Generator().manual_seed(random.Random(f"training {seed} {number}").getrandbits(63))
    timestep = int(torch.randint(NUM_TRAIN_TIMESTEPS, (), generator=generator))
    noise = torch.randn(shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    return timestep, noise


def score_weights(row: Row, score: str, halves: str) -> Weights:
    """A candidate's score as coefficients of (A, ‖ε - ε̂‖) of the rows it is made of."""
    image, _, draw = row
    attention = 0.0 if score == "denoising" else 1.0
    denoising = 0.0 if score == "attention" else 1.0
    shared = attention / 2 if halves == "both" else 0.0
    return {row: (attention - shared, -denoising), (image, EMPTY, draw): (shared, denoising)}


def hinge_step(
    denoiser: EpsilonDenoiser,
    latents: torch.Tensor,
    prompts: PromptEmbeddings,
    examples: Sequence[Example],
    draws: Draws,
    score: str,
    halves: str,
    margin: float,
    scale: float,
    backward: Callable[[torch.Tensor], Any],
    batch_size: int,
) -> StepOutcome:
    """Adds the gradient of scale · Σ hinge loss over the examples to the trainable weights.

    Args:
        denoiser: the model, with trainable attention prompts.
        latents: z0 of each image, (images, C, h, w) float32.
        prompts: the texts.
        examples: positives and negatives.
        draws: timesteps and noises that the examples refer to.
        score: which score is trained: "hybrid", "attention" or "denoising".
        halves: "cond" or "both".
        margin: how far the positive should be ahead.
        scale: of the objective: 1 / (examples in one optimizer step, of all processes).
        backward: called with the scaled objective, such as `accelerator.backward`.
        batch_size: most rows in a UNet call without gradient. With gradient all rows go at once.

    Returns:
        Losses and scores, also where they are not finite: then nothing is added to the gradient.
    """
    weights = [[score_weights(row, score, halves) for row in example.candidates] for example in examples]
    needed = dict.fromkeys(
        row for example in weights for candidate in example for row, counts in candidate.items() if any(counts)
    )
    # Gradient checkpointing repeats parts of a call and must not be left in the middle of one.
    attention_only = score == "attention" and not denoiser.unet.is_gradient_checkpointing
    with read_attention(denoiser.unet, attention_only=attention_only) as reader:

        def readings(rows: list[Row], groups: RowGroups | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            layers, error = measure(denoiser, reader, latents, prompts, draws, rows, groups)
            attention = layers.mean(dim=1)  # (rows,)
            return attention, torch.zeros_like(attention) if error is None else error

        values: dict[Row, tuple[float, float]] = {}
        with torch.no_grad(), share_prefix(denoiser.unet) as groups:
            for rows in chunks(needed, batch_size):
                pairs = torch.stack(readings(rows, groups), dim=1)  # (rows, 2), float64 where the device has it
                values.update(zip(rows, pairs.tolist(), strict=True))
        scores = [
            [sum(a * values[row][0] + e * values[row][1] for row, (a, e) in c.items() if a or e) for c in example]
            for example in weights
        ]
        objective: dict[Row, list[float]] = defaultdict(lambda: [0.0, 0.0])
        loss, satisfied = 0.0, 0
        for example, candidates, s in zip(examples, weights, scores, strict=True):
            negatives = [i for i in range(len(s)) if i != example.positive]
            hardest = max(negatives, key=s.__getitem__)
            hinge = margin + s[hardest] - s[example.positive]
            satisfied += s[hardest] < s[example.positive]
            loss += hinge if not hinge < 0 else 0.0  # "not <" lets NaN through, to be seen
            if hinge > 0:
                for sign, candidate in ((1, hardest), (-1, example.positive)):
                    for row, (a, e) in candidates[candidate].items():
                        objective[row][0] += sign * scale * a
                        objective[row][1] += sign * scale * e
        counting = [row for row, counts in objective.items() if any(counts)]
        if counting and torch.tensor(loss).isfinite():
            attention, error = readings(counting)
            counts = torch.tensor([objective[row] for row in counting], device=attention.device)  # (rows, 2)
            backward((counts[:, 0] * attention + counts[:, 1] * error.float()).sum())
    return StepOutcome(loss, satisfied, len(examples), scores)
