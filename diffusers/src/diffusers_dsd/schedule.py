"""Which timesteps a score looks at, and the noise that every image and text meets there."""

import torch

from diffusers_dsd.errors import DSDError

NUM_TRAIN_TIMESTEPS = 1000


def timestep_grid(sampling_steps: int) -> list[int]:
    """The timesteps whose scores are averaged, ascending, as the paper's released code picks them.

    From the list 999, 998, …, 0 it takes the entries i = 10, 10+r, 10+2r, … < 990 with r = int(1000/S).

    Args:
        sampling_steps: S, between 1 and 1000. S=40 gives 40 timesteps (14 … 989), S=200 gives 196.

    Raises:
        DSDError: S is outside 1 … 1000.
    """
    if not 1 <= sampling_steps <= NUM_TRAIN_TIMESTEPS:
        raise DSDError(f"--sampling_time_steps is {sampling_steps}: choose a number from 1 to {NUM_TRAIN_TIMESTEPS}.")
    stride = NUM_TRAIN_TIMESTEPS // sampling_steps
    return sorted(NUM_TRAIN_TIMESTEPS - 1 - i for i in range(10, 990, stride))


def shared_noise(seed: int, timestep: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise every image and text meets at `timestep`: standard normal, float32, on the CPU.

    It depends on (seed, timestep, shape) alone: not on device, process, batch size or order.

    Args:
        seed: any non-negative integer.
        timestep: 0 … 999.
        shape: of one latent, (channels, height, width).
    """
    # Far-apart seeds per timestep: neighbouring user seeds never reuse each other's noise.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
    return torch.randn(shape, generator=generator)
