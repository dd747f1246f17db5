"""What several tests share: the golden model, the bundled model, and no network."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch

from diffusers_dsd import DSDPipeline

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REFERENCE = Path(os.environ.get("DSD_REFERENCE_DATA", ROOT.parent / "shared" / "reference-data"))


@pytest.fixture
def golden_pipe() -> DSDPipeline:
    """A fresh pipeline of the golden model: a test may change it."""
    pipe = DSDPipeline.from_pretrained(GOLDEN / "tiny-sd", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def golden_noise() -> torch.Tensor:
    """The original's noise file: row k belongs to the k-th timestep of a grid."""
    return torch.randn(1000, 4, 64, 64, generator=torch.Generator().manual_seed(2305))


@pytest.fixture(scope="session")
def expected() -> dict:
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="session")
def golden_images() -> list[Path]:
    return [GOLDEN / "images" / f"{i}.png" for i in range(3)]


@pytest.fixture
def reference_data() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip("the reference data (other people's annotation files) is not beside the repository")
    return REFERENCE
