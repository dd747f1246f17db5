"""Noise estimates ε̂ from models that predict different things, behind one call (as k-diffusion's wrappers do)."""

from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel

from diffusers_dsd.errors import DSDError
from diffusers_dsd.schedule import NUM_TRAIN_TIMESTEPS


class EpsilonDenoiser:
    """A UNet that predicts the noise itself.

    Attributes:
        unet: the model, in any dtype.
        alphas_cumprod: ᾱ_t for t = 0 … 999, (1000,) float32 on the CPU.
    """

    def __init__(self, unet: UNet2DConditionModel, alphas_cumprod: torch.Tensor) -> None:
        self.unet = unet
        self.alphas_cumprod = alphas_cumprod

    def scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(ᾱ_t) and sqrt(1-ᾱ_t), each (rows, 1, 1, 1), for timesteps (rows,)."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(ᾱ_t)·z0 + sqrt(1-ᾱ_t)·ε for latents and noise (rows, C, h, w) and timesteps (rows,)."""
        signal, sigma = self.scales(timesteps)
        return signal * latents + sigma * noise

    def __call__(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """ε̂(z_t, t, y), (rows, C, h, w) float32.

        Args:
            noisy_latents: z_t, (rows, C, h, w) float32.
            timesteps: (rows,) int64, 0 … 999; each row may have its own.
            prompt_embeds: (rows, tokens, width).
            added_cond_kwargs: what SDXL's UNet is told besides: "text_embeds" (rows, d) and "time_ids" (rows, 6).
        """
        prediction = self.unet(
            noisy_latents.to(self.unet.dtype),
            timesteps,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs=added_cond_kwargs,
            return_dict=False,
        )[0]
        return self.to_noise(prediction.float(), noisy_latents, timesteps)

    def to_noise(self, prediction: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise estimate that a prediction (rows, C, h, w) amounts to."""
        return prediction


class VDenoiser(EpsilonDenoiser):
    """A UNet that predicts v = sqrt(ᾱ)·ε - sqrt(1-ᾱ)·z0 (arXiv 2202.00512), such as Stable Diffusion 2.1 at 768²."""

    def to_noise(self, prediction: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal, sigma = self.scales(timesteps)
        return signal * prediction + sigma * noisy_latents


_DENOISERS = {"epsilon": EpsilonDenoiser, "v_prediction": VDenoiser}


def make_denoiser(unet: UNet2DConditionModel, scheduler: SchedulerMixin) -> EpsilonDenoiser:
    """The denoiser that fits a model, told by its scheduler's configuration.

    Raises:
        DSDError: the model predicts something else, or was not trained with 1000 timesteps.
    """
    config: Any = scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in _DENOISERS:
        raise DSDError(
            f"This model predicts {prediction_type!r}: DSD scores models that predict {' or '.join(_DENOISERS)}."
        )
    # Every scheduler of the family shares the training's betas; DDPM's is the plain list of ᾱ_t.
    alphas_cumprod = DDPMScheduler.from_config(config).alphas_cumprod
    if len(alphas_cumprod) != NUM_TRAIN_TIMESTEPS:
        raise DSDError(
            f"This model was trained with {len(alphas_cumprod)} timesteps: DSD scores models with "
            f"{NUM_TRAIN_TIMESTEPS}."
        )
    return _DENOISERS[prediction_type](unet, alphas_cumprod.float())
