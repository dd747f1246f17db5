"""The score of arXiv 2305.10722 over (image, text) pairs, sharing all work that pairs have in common.

For a latent z0, a text y and a timestep t with noise ε_t:

    z_t = sqrt(ᾱ_t)·z0 + sqrt(1-ᾱ_t)·ε_t
    A   = mean logsumexp of the scored cross-attention logits          (attention.py)
    B   = ‖ε_t - ε̂(z_t, t, ∅)‖₂ - ‖ε_t - ε̂(z_t, t, y)‖₂                (denoiser.py)

Every UNet call is a batch of rows (timestep, image, text). Rows of different images, texts and timesteps mix, and
the empty text's row is computed once per image and timestep for all texts, and only where the score needs it.
"""

from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch

from diffusers_dsd.attention import PATHS, AttentionReader, EverythingRead, read_attention
from diffusers_dsd.denoiser import EpsilonDenoiser
from diffusers_dsd.errors import DSDError
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.shared_prefix import RowGroups, share_prefix

SCORES = ("hybrid", "attention", "denoising")
HALVES = ("both", "cond")
EMPTY = -1  # index of the empty text among the prompt embeddings

Row = tuple[int, int, int]  # image, text (or EMPTY), draw: what one row of a UNet call looks at
EmptyReading = tuple[list[float], float]  # A of each scored layer, and ‖ε - ε̂‖ (NaN where it was not computed)


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
class Draws:
    """Timesteps and noises that pairs are looked at with.

    Attributes:
        timesteps: (draws,) int64.
        noise: (draws, C, h, w) float32.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class PairScores:
    """Scores of P pairs at T timesteps, on the CPU.

    Attributes:
        layers: of each of L scored layers A(y), or ½(A(y) + A(∅)) for both halves, (T, P, L) float64; None for the
            denoising score.
        denoising: B(y), (T, P) float64; None for the attention score.
    """

    layers: torch.Tensor | None
    denoising: torch.Tensor | None

    @property
    def attention(self) -> torch.Tensor | None:
        """The attention term, (T, P): every layer counts alike, whatever its size."""
        return None if self.layers is None else self.layers.mean(dim=-1)

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
    draws: Draws,
    score: str,
    halves: str,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda rows: None,
    paths: Iterable[str] = PATHS,
    empties: MutableMapping[tuple[int, int], EmptyReading] | None = None,
) -> PairScores:
    """Scores P pairs of an image and a text at T timesteps. A pair that is there twice is computed once.

    Args:
        denoiser: the model.
        latents: z0 of each image, (images, C, h, w) float32 on the model's device.
        prompts: the texts, on the model's device.
        pairs: (image, text) indices.
        draws: T timesteps, 0 … 999, and the noise ε_t of each, which all pairs share.
        score: "hybrid", "attention" or "denoising".
        halves: "cond" or "both": whether A is the text's own, or averaged with the empty text's.
        batch_size: most rows in one UNet call.
        on_batch: called after each UNet call with its number of rows.
        paths: whose scored layers count, of "down", "mid" and "up".
        empties: what the empty text's rows of (image, draw) read: those that are there are not computed, the others
            are added.

    Raises:
        DSDError: an unknown score, halves or path.
    """
    check_score(score, halves)
    empties = {} if empties is None else empties
    num_draws = len(draws.timesteps)
    draws = Draws(draws.timesteps.to(latents.device), draws.noise.to(latents.device))
    with_empty = needs_empty_text(score, halves)
    rows = _rows_of(pairs, num_draws, empties if with_empty else None)
    readings, errors = [], []  # stay on the device: a copy to the CPU per batch would stall it
    with (
        read_attention(denoiser.unet, paths=paths, attention_only=score == "attention") as reader,
        share_prefix(denoiser.unet) as groups,
    ):
        for batch in chunks(rows, batch_size):
            reading, error = measure(denoiser, reader, latents, prompts, draws, batch, groups)
            readings.append(reading)
            errors.append(reading.new_full((len(batch),), torch.nan) if error is None else error)
            on_batch(len(batch))
    layers, error = torch.cat(readings).cpu().double(), torch.cat(errors).cpu().double()  # (rows, L), (rows,)

    own = torch.tensor([[rows[image, text, draw] for image, text in pairs] for draw in range(num_draws)])  # (T, P)
    layers_of_pairs, error_of_pairs = layers[own], error[own]
    if with_empty:
        for (image, text, draw), row in rows.items():
            if text == EMPTY:
                empties[image, draw] = (layers[row].tolist(), float(error[row]))
        empty = [[empties[image, draw] for image, _ in pairs] for draw in range(num_draws)]
        error_empty = torch.tensor([[error for _, error in column] for column in empty], dtype=torch.float64)
        if halves == "both":
            layers_empty = torch.tensor([[reading for reading, _ in column] for column in empty], dtype=torch.float64)
            layers_of_pairs = (layers_of_pairs + layers_empty) / 2
    return PairScores(
        None if score == "denoising" else layers_of_pairs,
        None if score == "attention" else error_empty - error_of_pairs,
    )


def _rows_of(
    pairs: Sequence[tuple[int, int]], num_draws: int, known: Container[tuple[int, int]] | None
) -> dict[Row, int]:
    """The distinct rows that pairs need at every draw, and their order.

    Rows that share their image and draw are neighbours, so that they share the text-free part of a UNet call. The
    empty text's are among them, but for the (image, draw) that are `known`; without that none is.
    """
    rows: dict[Row, int] = {}
    distinct = sorted(set(pairs))
    for draw in range(num_draws):
        for image, group in groupby(distinct, key=lambda pair: pair[0]):
            if known is not None and (image, draw) not in known:
                rows[image, EMPTY, draw] = len(rows)
            for _, text in group:
                rows[image, text, draw] = len(rows)
    return rows


def chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows in order, at most `size` at a time."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


@torch.no_grad()
def attention_to_tokens(
    denoiser: EpsilonDenoiser,
    latents: torch.Tensor,
    prompts: PromptEmbeddings,
    draws: Draws,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> tuple[float, list[torch.Tensor]]:
    """A of one image and the first text, and what each token has in it (see `wordmaps`).

    Args:
        denoiser, prompts, draws, batch_size, on_batch: as for `score_pairs`.
        latents: z0 of the image, (1, C, h, w) float32 on the model's device.

    Returns:
        A, and for each scored layer its attention probabilities, averaged over heads and timesteps:
        (queries, tokens) float32 on the CPU.
    """
    num_draws = len(draws.timesteps)
    draws = Draws(draws.timesteps.to(latents.device), draws.noise.to(latents.device))
    attention, sums = 0.0, {}
    with read_attention(denoiser.unet, keep_probabilities=True, attention_only=True) as reader:
        for rows in chunks([(0, 0, draw) for draw in range(num_draws)], batch_size):
            reading, _ = measure(denoiser, reader, latents, prompts, draws, rows)
            attention += float(reading.mean(dim=1).double().sum())
            for layer, probabilities in reader.probabilities.items():
                sums[layer] = sums.get(layer, 0) + probabilities.sum(0)  # (queries, tokens)
            on_batch(len(rows))
    return attention / num_draws, [total.cpu() / num_draws for total in sums.values()]


def measure(
    denoiser: EpsilonDenoiser,
    reader: AttentionReader,
    latents: torch.Tensor,
    prompts: PromptEmbeddings,
    draws: Draws,
    rows: Sequence[Row],
    groups: RowGroups | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a score is made of, for one UNet call, with gradient if enabled.

    Args:
        denoiser: the model, patched by the contexts of `reader` and `groups`.
        reader: reads the attention.
        latents: z0 of each image, (images, C, h, w).
        prompts: the texts.
        draws: timesteps and noises, on the model's device.
        rows: what each row looks at.
        groups: is told which rows share the text-free part of the call.

    Returns:
        The readings of each scored layer (rows, layers), and ‖ε_t - ε̂(z_t, t, y)‖₂ of each row (rows,), None where
        the reader ends calls before there is a noise estimate.
    """
    image, text, draw = (list(index) for index in zip(*rows, strict=True))
    timesteps, noise = draws.timesteps[draw], draws.noise[draw]  # (rows,), (rows, C, h, w)
    if groups is not None:
        numbers: dict[tuple[int, int], int] = {}
        groups.set([numbers.setdefault((i, d), len(numbers)) for i, _, d in rows], latents.device)
    noisy = denoiser.add_noise(latents[image], noise, timesteps)  # (rows, C, h, w)
    try:
        estimate = denoiser(noisy, timesteps, **prompts.rows(text))
    except EverythingRead:
        return reader.by_layer(), None
    return reader.by_layer(), _norm(noise - estimate)


def _norm(residual: torch.Tensor) -> torch.Tensor:
    """L2 norm of each row (rows, C, h, w) -> (rows,), summed in float64 where the device has it."""
    # Two norms near 128 differ in their last digits: a sum in float32 would decide close pairs by rounding.
    dtype = torch.float32 if residual.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(residual, dim=(1, 2, 3), dtype=dtype)
