import json
from pathlib import Path

import pytest
import torch

from diffusers_dsd.errors import DSDError
from diffusers_dsd.schedule import shared_noise, timestep_grid

GOLDEN = Path(__file__).parent / "golden"


def test_the_grid_is_the_released_code_s():
    expected = json.loads((GOLDEN / "timesteps.json").read_text())
    assert {steps: timestep_grid(int(steps)) for steps in expected} == expected


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_a_grid_of_no_or_too_many_steps_is_refused(steps):
    with pytest.raises(DSDError, match="sampling_time_steps"):
        timestep_grid(steps)


def test_noise_depends_on_seed_and_timestep_alone():
    noise = shared_noise(3, 500, (4, 8, 8))
    torch.manual_seed(99)
    assert torch.equal(noise, shared_noise(3, 500, (4, 8, 8)))
    assert not torch.equal(noise, shared_noise(3, 501, (4, 8, 8)))
    assert not torch.equal(noise, shared_noise(4, 500, (4, 8, 8)))
    assert abs(shared_noise(0, 1, (4, 128, 128)).std() - 1) < 0.02
