"""Discriminative Stable Diffusion (arXiv 2305.10722): a diffusion model as an image-text matcher."""
