"""How many rows go into one UNet call, from the memory there is (`--batchsize auto`)."""

from typing import TYPE_CHECKING

import psutil
import torch

from diffusers_dsd.attention import read_attention
from diffusers_dsd.scoring import EMPTY

if TYPE_CHECKING:
    from diffusers_dsd.pipeline import DSDPipeline

_MOST_ROWS = 256
# Places of latents in a call on a CPU (4 rows at 64 × 64), where a row takes as long in a larger call
_CPU_PLACES = 16_384
_SHARE = 0.8  # of the free memory that may be used


def auto_batch_size(pipe: "DSDPipeline") -> int:
    """Rows of a UNet call that fit into the memory of the pipeline's device and are worth it.

    On a GPU two calls, of 1 and of 3 rows, tell what a row needs. On a CPU the call stays small.
    """
    size = pipe.resolution // pipe.vae_scale_factor
    device = pipe._execution_device
    if device.type == "cuda":
        few, more = (_peak_bytes(pipe, rows, size) for rows in (1, 3))
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch holds for later
        return _between(int(_SHARE * free / max((more - few) / 2, 1)), _MOST_ROWS)
    # A generous guess of what a row needs: forty times the first level's activations.
    row = 40 * size**2 * pipe.unet.config.block_out_channels[0] * pipe.unet.dtype.itemsize
    return _between(int(_SHARE * psutil.virtual_memory().available / row), max(1, _CPU_PLACES // size**2))


def _between(rows: int, most: int) -> int:
    return max(1, min(rows, most))


@torch.no_grad()
def _peak_bytes(pipe: "DSDPipeline", rows: int, size: int) -> int:
    """The most memory that a call of so many rows had at once."""
    latents = torch.zeros(rows, pipe.vae.config.latent_channels, size, size, device=pipe._execution_device)
    timesteps = torch.full((rows,), 500, device=latents.device)
    prompts = pipe.encode_texts([])
    torch.cuda.reset_peak_memory_stats(latents.device)
    with read_attention(pipe.unet):
        pipe.denoiser(latents, timesteps, **prompts.rows([EMPTY] * rows))
    return torch.cuda.max_memory_allocated(latents.device)
