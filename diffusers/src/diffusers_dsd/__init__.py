"""Discriminative Stable Diffusion (arXiv 2305.10722): a diffusion model as an image-text matcher."""

from diffusers_dsd.errors import DSDError
from diffusers_dsd.outputs import DSDOutput
from diffusers_dsd.pipeline import DSDPipeline

__all__ = ["DSDError", "DSDOutput", "DSDPipeline"]
