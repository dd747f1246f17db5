"""From pictures to latents and from texts to prompt embeddings: what `DSDPipeline` does before the UNet."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from transformers import CLIPTokenizer

from diffusers_dsd.errors import DSDError, ItemError
from diffusers_dsd.features import FeatureCache, Tensors, image_key
from diffusers_dsd.images import open_image, to_tensor
from diffusers_dsd.scoring import PromptEmbeddings

logger = logging.get_logger(__name__)

ImageInput = Image.Image | str | os.PathLike | torch.Tensor
# An evaluation has two threads: the VAE may change its type while it encodes, and tokenizers take one call at a time
_ENCODING = threading.Lock()
_VAE_BATCH = 4  # images per VAE call: its memory grows with the square of the resolution


def check_texts(texts: Sequence[Any]) -> None:
    """Looks at texts before a tokenizer does.

    Raises:
        ItemError: a text is not a string, or holds half a surrogate pair, which no tokenizer takes.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ItemError(f"A text is {text!r}, of type {type(text).__name__}: give strings.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ItemError(
                f"The text {text[:80]!r} holds half of a character that takes two (a surrogate): write it anew."
            ) from None


class EncodesImagesAndTexts:
    """Encoding with the components of a Diffusers pipeline, which this is mixed into."""

    # of the pipeline
    vae: Any
    unet: Any
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer | None
    text_encoder: Any
    text_encoder_2: Any
    vae_scale_factor: int
    config: Any
    _execution_device: torch.device
    _resolution: int | None
    _reported_as_truncated: set[str]

    @property
    def resolution(self) -> int:
        """Width and height of images in pixels: what the model was trained on, unless another is set.

        Raises:
            DSDError: when set to what the UNet cannot halve as often as it has to.
        """
        return self._resolution or self.unet.config.sample_size * self.vae_scale_factor

    @resolution.setter
    def resolution(self, pixels: int) -> None:
        unit = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if pixels < unit or pixels % unit:
            raise DSDError(f"A resolution of {pixels} does not fit this model: choose a multiple of {unit}.")
        self._resolution = pixels

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageInput], cache: FeatureCache | None = None) -> torch.Tensor:
        """z0 = scaling_factor · E(x) of each image: (n, C, h, w) float32 on the execution device.

        Args:
            images: PIL images, paths, or tensors (3, H, W) in [-1, 1] at the model's resolution.
            cache: knows the latents of picture files that were encoded before.

        Raises:
            DSDError: an image cannot be read, or a tensor has another shape or range.
        """
        device = self._execution_device
        found: dict[int, torch.Tensor] = {}
        keys = [None if cache is None else self._latents_key(image, cache) for image in images]
        for place, key in enumerate(keys):
            if cache is not None and key is not None and (entry := cache.get(key)) is not None:
                found[place] = entry["latents"].to(device)
        missing = [place for place in range(len(images)) if place not in found]
        for batch in (missing[start : start + _VAE_BATCH] for start in range(0, len(missing), _VAE_BATCH)):
            pixels = torch.stack([self._pixels(images[place], cache) for place in batch])  # (k, 3, R, R), contiguous
            for place, latents in zip(batch, self._encode_pixels(pixels.to(device)), strict=True):
                found[place] = latents
                if cache is not None and (key := keys[place]) is not None:
                    cache.put(key, {"latents": latents.clone()})  # not a view that keeps its whole batch
        return torch.stack([found[place] for place in range(len(images))])

    def encode_ahead(
        self, images: Sequence[ImageInput], texts: Sequence[str], batch_size: int, cache: FeatureCache
    ) -> None:
        """Reads the picture files among the images for a later `encode_images`, but for those whose latents are known.

        On a GPU it encodes them and the texts as well; a CPU has no cores to spare for that. For another thread, while
        the UNet computes. What is wrong with a picture or text is left for `encode_images` and `encode_texts` to name.
        """
        keys = [(image, self._latents_key(image, cache)) for image in images]
        new = [image for image, key in keys if key is not None and cache.get(key) is None]
        readable = cache.decode(new, self.resolution)
        if not self._encodes_ahead:
            return
        with suppress(ItemError):
            if readable:
                self.encode_images(readable, cache)
        with suppress(ItemError):
            self.encode_texts(texts, batch_size, cache)

    @property
    def _encodes_ahead(self) -> bool:
        # a model that is moved to the GPU in parts would have two threads move them
        return self._execution_device.type == "cuda" and not hasattr(self.unet, "_hf_hook")

    def _latents_key(self, image: ImageInput, cache: FeatureCache) -> tuple | None:
        key = image_key(image, self.resolution)
        return None if key is None else ("latents", *key, *filter(None, [cache.fingerprint(self.vae)]))

    def _pixels(self, image: ImageInput, cache: FeatureCache | None = None) -> torch.Tensor:
        size = self.resolution
        if isinstance(image, torch.Tensor):
            if tuple(image.shape) != (3, size, size):
                raise DSDError(f"An image tensor is {tuple(image.shape)}: this model takes (3, {size}, {size}).")
            if not (image.isfinite().all() and image.abs().max() <= 1.001):
                raise DSDError("An image tensor holds values outside [-1, 1]: scale it as Diffusers does.")
            return image.float().cpu().contiguous()
        if isinstance(image, Image.Image):
            return to_tensor(image, size)
        return to_tensor(open_image(image), size) if cache is None else cache.pixels(image, size)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(k, 3, R, R) in [-1, 1] -> latents (k, C, h, w) float32."""
        # SDXL's VAE overflows in float16 and says so in its configuration, as Diffusers' own pipeline expects.
        with _ENCODING:
            upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
            upcast = upcast and self.text_encoder_2 is not None
            if upcast:
                self.vae.to(torch.float32)
            try:
                latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean.float()
            finally:
                if upcast:
                    self.vae.to(torch.float16)
        mean, std = (getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            latents = (latents - latents.new_tensor(mean).view(1, -1, 1, 1)) / latents.new_tensor(std).view(1, -1, 1, 1)
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_texts(
        self, texts: Sequence[str], batch_size: int = 16, cache: FeatureCache | None = None
    ) -> PromptEmbeddings:
        """Prompt embeddings of the texts, and of the empty text as the last row, on the execution device.

        A text longer than the tokenizer's maximum is truncated (`score` reports it).

        Args:
            texts: any number of strings.
            batch_size: most texts that are encoded together.
            cache: knows the embeddings of texts that were encoded before.

        Raises:
            ItemError: as `check_texts`.
        """
        check_texts(texts)
        rows = [*texts, ""]
        found: dict[str, Tensors] = {}
        if cache is not None:
            encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
            fingerprint = cache.fingerprint(*encoders)
            known = {text: cache.get(("text", fingerprint, text)) for text in dict.fromkeys(rows)}
            found = {text: entry for text, entry in known.items() if entry is not None}
        missing = [text for text in dict.fromkeys(rows) if text not in found]
        for batch in (missing[start : start + batch_size] for start in range(0, len(missing), batch_size)):
            embeds, pooled = self._encode_text_batch(batch)
            for place, text in enumerate(batch):
                entry = {"embeds": embeds[place].clone()}  # (tokens, width); not a view that keeps its whole batch
                if pooled is not None:
                    entry["pooled"] = pooled[place].clone()
                found[text] = entry
                if cache is not None:
                    cache.put(("text", fingerprint, text), entry)
        device = self._execution_device
        embeds = torch.stack([found[text]["embeds"].to(device) for text in rows])  # (texts + 1, tokens, width)
        if self.text_encoder_2 is None:
            return PromptEmbeddings(embeds)
        pooled = torch.stack([found[text]["pooled"].to(device) for text in rows])  # (texts + 1, d)
        if self.config.force_zeros_for_empty_prompt:  # SDXL was trained with zeros for the missing text
            embeds[-1], pooled[-1] = 0, 0
        size = float(self.resolution)  # original size, crop corner, target size: a whole picture, uncropped
        time_ids = embeds.new_tensor([[size, size, 0, 0, size, size]])
        return PromptEmbeddings(embeds, pooled, time_ids)

    def _encode_text_batch(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(k, tokens, width), and for SDXL the pooled (k, d)."""
        if self.text_encoder_2 is None:
            ids, mask = self._tokenize(texts, self.tokenizer)
            if not getattr(self.text_encoder.config, "use_attention_mask", False):
                mask = None
            return self.text_encoder(ids, attention_mask=mask)[0], None
        hidden, pooled = [], None
        for tokenizer, encoder in (
            (self.tokenizer, self.text_encoder),
            (self.tokenizer_2, self.text_encoder_2),
        ):
            output = encoder(self._tokenize(texts, tokenizer)[0], output_hidden_states=True)
            hidden.append(output.hidden_states[-2])  # SDXL reads the last layer but one
            pooled = output[0]  # the second encoder's is the projection
        return torch.cat(hidden, dim=-1), pooled

    def _tokenize(self, texts: list[str], tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, each (k, tokens), padded and truncated to the tokenizer's maximum."""
        texts = [self.maybe_convert_prompt(text, tokenizer) for text in texts]
        longest = tokenizer.model_max_length
        with _ENCODING:
            tokens = tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        tokens = tokens.to(self._execution_device)
        return tokens.input_ids, tokens.attention_mask

    def _report_truncated(self, texts: Sequence[str], where: str) -> None:
        """Says once of each text that is too long how much of it counts."""
        longest = self.tokenizer.model_max_length
        for text in texts:
            # Every token is at least one character, so a short text needs no look.
            if not isinstance(text, str) or len(text) <= longest - 2 or text in self._reported_as_truncated:
                continue
            with _ENCODING:
                tokens = len(self.tokenizer(self.maybe_convert_prompt(text, self.tokenizer)).input_ids)
            if tokens > longest:
                if len(self._reported_as_truncated) >= 10_000:  # of a benchmark of any size: rather say some twice
                    self._reported_as_truncated.clear()
                self._reported_as_truncated.add(text)
                logger.warning(
                    f"{where}only the first {longest - 2} of {tokens - 2} tokens count in the text {text[:80]!r}…"
                )
