"""The score of arXiv 2305.10722 over (image, text) pairs, sharing all work that pairs have in common.

For a latent z0, a text y and a timestep t with noise ε_t:

    z_t = sqrt(ᾱ_t)·z0 + sqrt(1-ᾱ_t)·ε_t
    A   = mean logsumexp of the scored cross-attention logits          (attention.py)
    B   = ‖ε_t - ε̂(z_t, t, ∅)‖₂ - ‖ε_t - ε̂(z_t, t, y)‖₂                (denoiser.py)

Every UNet call is a batch of rows (timestep, image, text). Rows of different images, texts and timesteps mix, and
the empty text's row is computed once per image and timestep for all texts, and only where the score needs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from diffusers_dsd.attention import AttentionReader, read_attention
from diffusers_dsd.denoiser import EpsilonDenoiser
from diffusers_dsd.errors import DSDError
from diffusers_dsd.schedule import timestep_grid

SCORES = ("hybrid", "attention", "denoising")
HALVES = ("both", "cond")
EMPTY = -1  # index of the empty text among the prompt embeddings


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the UNet is told of each text; the last row is the empty text ∅.

    Attributes:
        embeds: (texts + 1, tokens, width).
        pooled: (texts + 1, d) for SDXL, otherwise None.
        time_ids: (1, 6) for SDXL, otherwise None.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def rows(self, texts: list[int]) -> dict[str, torch.Tensor | dict[str, torch.Tensor] | None]:
        """The denoiser's arguments for rows with these texts (an index of -1 is the empty text)."""
        added = None
        if self.pooled is not None and self.time_ids is not None:
            added = {"text_embeds": self.pooled[texts], "time_ids": self.time_ids.expand(len(texts), -1)}
        return {"prompt_embeds": self.embeds[texts], "added_cond_kwargs": added}


@dataclass(frozen=True)
class PairScores:
    """Scores of P pairs at T timesteps, float32 on the CPU.

    Attributes:
        attention: A(y), or ½(A(y) + A(∅)) for both halves, (T, P); None for the denoising score.
        denoising: B(y), (T, P); None for the attention score.
    """

    attention: torch.Tensor | None
    denoising: torch.Tensor | None

    def total(self, attention_weight: float = 1.0) -> torch.Tensor:
        """s_t for every timestep and pair, (T, P): w·A + B, or the one term there is."""
        if self.attention is None or self.denoising is None:
            return next(term for term in (self.attention, self.denoising) if term is not None)
        return attention_weight * self.attention + self.denoising


def needs_empty_text(score: str, halves: str) -> bool:
    """Whether a score needs the empty text's row: all but the attention score of the text's own half do."""
    return score != "attention" or halves == "both"


def check_score(score: str, halves: str) -> None:
    """Raises DSDError for a score or halves that do not exist."""
    if score not in SCORES:
        raise DSDError(f"There is no score {score!r}: choose one of {', '.join(SCORES)}.")
    if halves not in HALVES:
        raise DSDError(f"There are no halves {halves!r}: choose one of {', '.join(HALVES)}.")


def num_rows(images: int, texts: int, sampling_steps: int, score: str, halves: str, apart: bool = False) -> int:
    """Rows the UNet computes for a matrix of images and texts: its cost.

    Args:
        apart: the two terms of a hybrid score come from two passes (see `DSDPipeline.score`, untuned_denoising).
    """
    if apart and score == "hybrid":
        return sum(num_rows(images, texts, sampling_steps, term, halves) for term in ("attention", "denoising"))
    per_timestep = images * (texts + needs_empty_text(score, halves))
    return per_timestep * len(timestep_grid(sampling_steps))


@torch.no_grad()
def score_pairs(
    denoiser: EpsilonDenoiser,
    latents: torch.Tensor,
    prompts: PromptEmbeddings,
    pairs: Sequence[tuple[int, int]],
    timesteps: Sequence[int],
    noise: torch.Tensor,
    score: str,
    halves: str,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> PairScores:
    """Scores P pairs of an image and a text at T timesteps.

    Args:
        denoiser: the model.
        latents: z0 of each image, (images, C, h, w) float32 on the model's device.
        prompts: the texts, on the model's device.
        pairs: (image, text) indices.
        timesteps: the grid, T numbers in 0 … 999.
        noise: ε_t, (T, C, h, w) float32, shared by all pairs.
        score: "hybrid", "attention" or "denoising".
        halves: "cond" or "both": whether A is the text's own, or averaged with the empty text's.
        batch_size: most rows in one UNet call.
        on_batch: called after each UNet call with its number of rows.

    Raises:
        DSDError: an unknown score or halves.
    """
    check_score(score, halves)
    images = sorted({image for image, _ in pairs}) if needs_empty_text(score, halves) else []
    columns = [(image, EMPTY) for image in images] + list(pairs)  # what is looked at, at every timestep
    device = latents.device
    grid = torch.as_tensor(timesteps, device=device)  # (T,)
    noise = noise.to(device)
    rows = ((t, image, text) for t in range(len(timesteps)) for image, text in columns)
    attentions, errors = [], []  # stay on the device: a copy to the CPU per batch would stall it
    with read_attention(denoiser.unet) as reader:
        while batch := list(islice(rows, batch_size)):
            at, image, text = (list(index) for index in zip(*batch, strict=True))
            attention, error = measure(denoiser, reader, latents[image], noise[at], grid[at], prompts, text)
            attentions.append(attention)
            errors.append(error)
            on_batch(len(batch))
    shape = (len(timesteps), len(columns))
    attention, error = (torch.cat(values).view(shape).cpu().double() for values in (attentions, errors))
    (attention_empty, attention), (error_empty, error) = (
        (values[:, : len(images)], values[:, len(images) :]) for values in (attention, error)
    )
    column = {image: place for place, image in enumerate(images)}
    own = [column[image] for image, _ in pairs] if images else []  # each pair's column of the empty text
    denoising = None if score == "attention" else (error_empty[:, own] - error).float()  # (T, P)
    if halves == "both":
        attention = (attention + attention_empty[:, own]) / 2
    return PairScores(None if score == "denoising" else attention.float(), denoising)


@torch.no_grad()
def attention_to_tokens(
    denoiser: EpsilonDenoiser,
    latents: torch.Tensor,
    prompts: PromptEmbeddings,
    timesteps: Sequence[int],
    noise: torch.Tensor,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> tuple[float, list[torch.Tensor]]:
    """A of one image and the first text, and what each token has in it (see `wordmaps`).

    Args:
        denoiser, prompts, timesteps, noise, batch_size, on_batch: as for `score_pairs`.
        latents: z0 of the image, (1, C, h, w) float32 on the model's device.

    Returns:
        A, and for each scored layer its attention probabilities, averaged over heads and timesteps:
        (queries, tokens) float32 on the CPU.
    """
    device = latents.device
    grid, noise = torch.as_tensor(timesteps, device=device), noise.to(device)
    attention, sums = 0.0, {}
    with read_attention(denoiser.unet, keep_probabilities=True) as reader:
        for at in torch.arange(len(grid), device=device).split(batch_size):
            rows = len(at)
            readings, _ = measure(
                denoiser, reader, latents.expand(rows, -1, -1, -1), noise[at], grid[at], prompts, [0] * rows
            )
            attention += float(readings.double().sum())
            for layer, probabilities in reader.probabilities.items():
                sums[layer] = sums.get(layer, 0) + probabilities.sum(0)  # (queries, tokens)
            on_batch(rows)
    return attention / len(grid), [total.cpu() / len(grid) for total in sums.values()]


def measure(
    denoiser: EpsilonDenoiser,
    reader: AttentionReader,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    prompts: PromptEmbeddings,
    texts: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a score is made of, for one UNet call: A and ‖ε_t - ε̂(z_t, t, y)‖₂ of each row, with gradient if enabled.

    Args:
        denoiser: the model, patched by `reader`'s context.
        reader: reads the attention.
        latents: z0 of each row, (rows, C, h, w).
        noise: ε_t of each row, (rows, C, h, w).
        timesteps: (rows,).
        prompts: the texts.
        texts: each row's text, `EMPTY` for the empty one.
    """
    noisy = denoiser.add_noise(latents, noise, timesteps)  # (rows, C, h, w)
    estimate = denoiser(noisy, timesteps, **prompts.rows(texts))
    return reader.mean(), _norm(noise - estimate)  # each (rows,)


def _norm(residual: torch.Tensor) -> torch.Tensor:
    """L2 norm of each row (rows, C, h, w) -> (rows,), summed in float64 where the device has it."""
    # Two norms near 128 differ in their last digits: a sum in float32 would decide close pairs by rounding.
    dtype = torch.float32 if residual.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(residual, dim=(1, 2, 3), dtype=dtype)
