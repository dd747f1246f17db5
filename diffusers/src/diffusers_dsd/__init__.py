"""Discriminative Stable Diffusion (arXiv 2305.10722): a text-to-image diffusion model as an image-text matcher."""
