"""Items whose images and texts are encoded, each once, and whose pairs can be scored at any timesteps."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from diffusers_dsd.attention import PATHS, scored_layers
from diffusers_dsd.features import FeatureCache, image_key
from diffusers_dsd.prompts import without_attention_prompts
from diffusers_dsd.schedule import shared_noise
from diffusers_dsd.scoring import Draws, EmptyReading, PairScores, needs_empty_text, score_pairs

if TYPE_CHECKING:
    from diffusers_dsd.pipeline import DSDPipeline

Pair = tuple[int, int]  # image and text, as indices of the distinct ones


class PreparedItems:
    """Several (images, texts) items, ready to be scored together.

    Args:
        pipe: the model.
        items: images and texts of each item. An image (by path or object) or a text that occurs in several items is
            encoded once.
        batch_size: most rows in one UNet call.
        halves: "cond" or "both".
        seed: of the noise.
        untuned_denoising: whether the denoising term leaves the attention prompts out.
        paths: whose scored layers count.
        cache: knows features of earlier items.
        on_batch: called with the number of rows of each UNet call.

    Attributes:
        pairs: of each item its (image, text) pairs, row by row of its matrix.

    Raises:
        DSDError: an image cannot be read, or a text is not a string.
    """

    def __init__(
        self,
        pipe: "DSDPipeline",
        items: Sequence[tuple[Sequence[Any], Sequence[str]]],
        batch_size: int,
        halves: str = "cond",
        seed: int = 0,
        untuned_denoising: bool = False,
        paths: Sequence[str] = PATHS,
        cache: FeatureCache | None = None,
        on_batch: Callable[[int], Any] = lambda rows: None,
    ) -> None:
        self.pipe, self.cache = pipe, cache
        self.batch_size, self.halves, self.seed, self.paths = batch_size, halves, seed, tuple(paths)
        self.untuned_denoising, self.on_batch = untuned_denoising, on_batch
        images = _Distinct(image for item_images, _ in items for image in item_images)
        texts = _Distinct(text for _, item_texts in items for text in item_texts)
        self.pairs = [[(images.index(i), texts.index(t)) for i in ims for t in ts] for ims, ts in items]
        self.prompts = pipe.encode_texts(texts.values, batch_size, cache)
        self.latents = pipe.encode_images(images.values, cache)  # (images, C, h, w)
        self.image_keys = [image_key(image, pipe.resolution) for image in images.values]

    def score(
        self,
        pairs: Sequence[Pair],
        timesteps: Sequence[int],
        score: str,
        noise: torch.Tensor | None = None,
        relative: bool = False,
    ) -> PairScores:
        """Scores pairs at timesteps.

        Args:
            pairs: of any of the items.
            timesteps: T of 0 … 999.
            score: "hybrid", "attention" or "denoising".
            noise: (T, C, h, w), in the place of the seed's.
            relative: leave out what the empty text reads: scores are then right up to a constant for each image and
                timestep.
        """
        shape = tuple(self.latents.shape[1:])
        has_own_noise = noise is not None
        noise = seeded_noise(self.seed, tuple(timesteps), shape) if noise is None else noise.float()
        draws = Draws(torch.as_tensor(timesteps), noise)
        cache = None if has_own_noise or relative else self.cache

        def score_with(score: str, untuned: bool = False) -> PairScores:
            images = sorted({image for image, _ in pairs}) if needs_empty_text(score, self.halves) else []
            empties = self._known_empties(images, timesteps, score, untuned, cache)
            if relative:
                nothing = ([0.0] * len(scored_layers(self.pipe.unet, self.paths)), 0.0)
                empties = {(image, draw): nothing for image in images for draw in range(len(timesteps))}
            known = {image for image, _ in empties}
            result = score_pairs(
                self.pipe.denoiser, self.latents, self.prompts, pairs, draws, score, self.halves, self.batch_size,
                self.on_batch, self.paths, empties,
            )  # fmt: skip
            for image in images:
                if (
                    cache is not None
                    and image not in known
                    and (key := self._empty_key(image, timesteps, score, untuned))
                ):
                    layers, error = zip(*(empties[image, draw] for draw in range(len(timesteps))), strict=True)
                    numbers = {
                        "layers": torch.tensor(layers, dtype=torch.float64),
                        "error": torch.tensor(error, dtype=torch.float64),
                    }
                    cache.put(key, numbers)
            return result

        if not self.untuned_denoising or score == "attention":
            return score_with(score)
        layers = score_with("attention").layers if score == "hybrid" else None
        with without_attention_prompts(self.pipe.unet):
            return PairScores(layers, score_with("denoising", untuned=True).denoising)

    def _known_empties(
        self, images: Sequence[int], timesteps: Sequence[int], score: str, untuned: bool, cache: FeatureCache | None
    ) -> dict[tuple[int, int], EmptyReading]:
        """What the cache knows of the empty text's readings of (image, timestep's place)."""
        found: dict[tuple[int, int], EmptyReading] = {}
        for image in images if cache is not None else []:
            key = self._empty_key(image, timesteps, score, untuned)
            if cache is not None and key is not None and (entry := cache.get(key)) is not None:
                for draw, (reading, error) in enumerate(zip(entry["layers"], entry["error"], strict=True)):
                    found[image, draw] = (reading.tolist(), float(error))
        return found

    def _empty_key(self, image: int, timesteps: Sequence[int], score: str, untuned: bool) -> tuple | None:
        """What the empty text's readings of an image are known by; None for pictures without a file."""
        key = self.image_keys[image]
        if key is None or self.cache is None:
            return None
        weights = self.cache.fingerprint(self.pipe.vae, self.pipe.unet)
        return "empty", *key, weights, tuple(timesteps), self.seed, score == "attention", untuned, self.paths


@lru_cache(maxsize=4)
def seeded_noise(seed: int, timesteps: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The shared noise of several timesteps, (T, *shape) float32 on the CPU; not to be changed."""
    return torch.stack([shared_noise(seed, timestep, shape) for timestep in timesteps])


class _Distinct:
    """The distinct values of a sequence in order; a path or text is known by its value, an image by identity."""

    def __init__(self, values: Any) -> None:
        self.values: list[Any] = []
        self._places: dict[Any, int] = {}
        for value in values:
            if self._places.setdefault(self._key(value), len(self.values)) == len(self.values):
                self.values.append(value)

    def index(self, value: Any) -> int:
        return self._places[self._key(value)]

    @staticmethod
    def _key(value: Any) -> Any:
        return str(value) if isinstance(value, (str, os.PathLike)) else id(value)
