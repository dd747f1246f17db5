"""The published procedure, plainly: what DSD's savings are measured against, and the oracle of the tests.

For every pair and timestep the picture goes through the VAE and both texts through the text encoder again, the empty
text's and the text's row through the UNet in one call, and every attention is a matrix in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from diffusers_dsd import DSDPipeline
from diffusers_dsd.attention import PATHS, scored_layers


class MaterialisedAttention:
    """Attention through its whole matrix of weights, as before `scaled_dot_product_attention`.

    Args:
        readings: gets the mean logsumexp of each row's logits, (rows,), if it is given.
    """

    def __init__(self, readings: list[torch.Tensor] | None = None) -> None:
        self.readings = readings

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))  # (rows*heads, queries, d)
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        logits = torch.bmm(query, key.transpose(1, 2)) * attn.scale  # (rows*heads, queries, tokens)
        if self.readings is not None:
            reading = logits.float().logsumexp(-1).mean(-1)  # (rows*heads,)
            self.readings.append(reading.view(len(hidden_states), -1).mean(1))
        output = attn.batch_to_head_dim(torch.bmm(logits.softmax(-1), value))
        return attn.to_out[1](attn.to_out[0](output))


@dataclass(frozen=True)
class PlainTerms:
    """What a UNet call said of the empty text and of the text: A and ‖ε - ε̂‖₂ of each, (2,)."""

    attention: torch.Tensor
    error: torch.Tensor

    def score(self, score: str, halves: str) -> torch.Tensor:
        """s_t of the design, from both halves."""
        attention = self.attention.mean() if halves == "both" else self.attention[1]
        denoising = self.error[0] - self.error[1]
        return {"hybrid": attention + denoising, "attention": attention, "denoising": denoising}[score]


@contextmanager
def materialised(pipe: DSDPipeline, paths: tuple[str, ...] = PATHS) -> Iterator[list[torch.Tensor]]:
    """Gives the UNet plain attention, and yields the list that gets the scored layers' readings in each call."""
    readings: list[torch.Tensor] = []
    layers = scored_layers(pipe.unet, paths)
    previous = dict(pipe.unet.attn_processors)
    plain = {
        name: MaterialisedAttention(readings if name.removesuffix(".processor") in layers else None)
        for name in previous
    }
    try:
        pipe.unet.set_attn_processor(plain)
        yield readings
    finally:
        pipe.unet.set_attn_processor(dict(previous))


def plain_terms(
    pipe: DSDPipeline, image: Image.Image, text: str, timestep: int, noise: torch.Tensor, paths: tuple[str, ...] = PATHS
) -> PlainTerms:
    """One pair at one timestep, with gradient if it is enabled; models without a second text encoder only.

    Args:
        pipe: the model.
        image: in RGB.
        text: the text.
        timestep: 0 … 999.
        noise: ε, (C, h, w).
        paths: whose scored layers count.
    """
    size, device = pipe.resolution, pipe.unet.device
    picture = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None].to(device, pipe.vae.dtype)
    latents = pipe.vae.encode(pixels).latent_dist.mean.float() * pipe.vae.config.scaling_factor  # (1, C, h, w)
    ids = pipe.tokenizer(["", text], padding="max_length", truncation=True, return_tensors="pt").input_ids
    embeds = pipe.text_encoder(ids.to(device))[0]  # (2, tokens, width)

    betas = torch.linspace(pipe.scheduler.config.beta_start**0.5, pipe.scheduler.config.beta_end**0.5, 1000) ** 2
    alpha = torch.cumprod(1 - betas, 0)[timestep].to(device)
    noise = noise.to(device)
    noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).expand(2, -1, -1, -1)  # (2, C, h, w)
    with materialised(pipe, paths) as readings:
        output = pipe.unet(noisy.to(pipe.unet.dtype), timestep, embeds).sample.float()
    if pipe.scheduler.config.prediction_type == "v_prediction":
        output = alpha.sqrt() * output + (1 - alpha).sqrt() * noisy
    error = torch.linalg.vector_norm(noise - output, dim=(1, 2, 3), dtype=torch.float64)
    return PlainTerms(torch.stack(readings).mean(0), error)


@torch.no_grad()
def plain_score(
    pipe: DSDPipeline,
    image: Image.Image,
    text: str,
    timesteps: list[int],
    noise: torch.Tensor,
    score: str = "hybrid",
    halves: str = "cond",
    paths: tuple[str, ...] = PATHS,
) -> float:
    """The score of one pair: the mean over timesteps, with one row of noise (T, C, h, w) for each."""
    terms = [plain_terms(pipe, image, text, t, e, paths) for t, e in zip(timesteps, noise, strict=True)]
    return sum(float(term.score(score, halves)) for term in terms) / len(terms)
