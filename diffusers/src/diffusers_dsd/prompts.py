"""Attention prompts: low-rank updates (LoRA) of the attention projections, learned from few examples.

Reads both forms a checkpoint comes in: Diffusers/PEFT safetensors, and the pickled `pytorch_model.bin` of the
paper's release. Whatever the form, the result is PEFT's: "….attn1.to_q.lora_A.weight" and "….lora_B.weight".
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from diffusers_dsd.errors import DSDError, first_line

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
SETTINGS_NAME = "dsd_settings.json"
ADAPTER_NAME = "dsd"
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
_WEIGHT_FILES = (WEIGHTS_NAME, "pytorch_lora_weights.bin", "pytorch_model.bin")
_PEFT_KEY = re.compile(r"(?:unet\.)?(.+)\.(to_q|to_k|to_v|to_out\.0)\.lora_(A|B)\.weight")
_LEGACY_KEY = re.compile(r"(?:unet\.)?(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class AttentionPrompts:
    """Attention prompts as read from disk, checked against nothing yet.

    Attributes:
        path: the weight file.
        state_dict: "<module>.lora_A.weight" (rank, in) and "<module>.lora_B.weight" (out, rank), at scale 1.
        settings: what the training noted beside the weights (`dsd_settings.json`); empty where there is nothing.
        legacy: whether the file is of the paper's original release.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    settings: dict[str, Any]
    legacy: bool

    @property
    def halves(self) -> str:
        """Which halves of the UNet these prompts were trained with: "both" or "cond"."""
        return self.settings.get("halves", "both" if self.legacy else "cond")

    @property
    def attention_weight(self) -> float:
        """w of the hybrid score w·A + B that was learned with these prompts; 1 where none was."""
        return float(self.settings.get("attention_weight", 1.0))

    @property
    def untuned_denoising(self) -> bool:
        """Whether the hybrid score takes its denoising term from the model without these prompts."""
        return bool(self.settings.get("untuned_denoising", False))


def read_attention_prompts(path: str | Path) -> AttentionPrompts:
    """Reads a checkpoint: a weight file, or a folder that holds one (safetensors is preferred).

    Raises:
        DSDError: there is no checkpoint, it cannot be read, or it holds something else than LoRA of attention
            projections.
    """
    file = _weight_file(Path(path))
    state_dict, alpha_over_rank, legacy = {}, {}, False
    for key, tensor in _read_tensors(file, alpha_over_rank).items():
        if match := _PEFT_KEY.fullmatch(key):
            module, projection, matrix = match.groups()
        elif match := _LEGACY_KEY.fullmatch(key):
            module, projection, matrix = match.groups()
            projection = "to_out.0" if projection == "to_out" else projection
            matrix, legacy = ("A" if matrix == "down" else "B"), True
        else:
            raise DSDError(
                f"{file} holds {key!r}, which is not part of an attention prompt: is it a checkpoint of DSD?"
            )
        state_dict[f"{module}.{projection}.lora_{matrix}.weight"] = tensor
    if not state_dict:
        raise DSDError(f"{file} holds no attention prompts: is it a checkpoint of DSD?")
    for name, scale in alpha_over_rank.items():
        if name in state_dict:
            state_dict[name] = state_dict[name] * scale
    return AttentionPrompts(file, state_dict, _read_settings(file.parent / SETTINGS_NAME), legacy)


def check_prompts_fit(prompts: AttentionPrompts, unet: UNet2DConditionModel, model: str) -> None:
    """Compares every tensor of a checkpoint with the attention projections of a UNet.

    Args:
        prompts: the checkpoint.
        unet: the model it should fit, without the adapter "dsd".
        model: the model's name for the message.

    Raises:
        DSDError: names the checkpoint, the model and the first tensor that is missing, unexpected or of another shape.
    """
    expected = expected_shapes(unet)
    belongs = f"{prompts.path} is a checkpoint of another model than {model}"
    for name, (out_features, in_features) in expected.items():
        for matrix, axis, size in (("A", 1, in_features), ("B", 0, out_features)):
            key = f"{name}.lora_{matrix}.weight"
            if key not in prompts.state_dict:
                raise DSDError(f"{belongs}: it has no {key}. Choose the --model it was trained on.")
            shape = tuple(prompts.state_dict[key].shape)
            if len(shape) != 2 or shape[axis] != size:
                raise DSDError(
                    f"{belongs}: {key} is {shape}, and the model needs {size} in dimension {axis}. "
                    f"Choose the --model it was trained on."
                )
        if prompts.state_dict[f"{name}.lora_A.weight"].shape[0] != prompts.state_dict[key].shape[1]:
            raise DSDError(f"{prompts.path} is damaged: the two matrices of {name} differ in rank.")
        if not prompts.state_dict[key].numel():
            raise DSDError(f"{prompts.path} is damaged: the matrices of {name} are empty.")
    if unexpected := {key.rsplit(".lora_", 1)[0] for key in prompts.state_dict} - set(expected):
        raise DSDError(
            f"{belongs}: it has {min(unexpected)}, which the model has not. Choose the --model it was trained on."
        )
    if bad := [key for key, tensor in prompts.state_dict.items() if not tensor.isfinite().all()]:
        raise DSDError(f"{prompts.path} holds NaN or infinite numbers ({bad[0]}): use an earlier checkpoint.")


def add_attention_prompts(unet: UNet2DConditionModel, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Freezes a UNet and adds new attention prompts to it, as the trainable PEFT adapter "dsd" (scale 1).

    They change nothing yet: the down-projections are normal with deviation 1/rank, the up-projections zero.

    Args:
        unet: without the adapter "dsd".
        rank: of each update; 4 in the paper.
        seed: of the down-projections.

    Returns:
        The trainable weights, float32 whatever the UNet's are.
    """
    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGET_MODULES)),
            ADAPTER_NAME,
        )
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def attention_prompts_of(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The attention prompts that a UNet holds, under the names of `AttentionPrompts.state_dict`, on the CPU."""
    tensors = get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def set_attention_prompts(unet: UNet2DConditionModel, tensors: dict[str, torch.Tensor]) -> None:
    """Overwrites the values of the attention prompts that a UNet holds, in place."""
    set_peft_model_state_dict(unet, tensors, adapter_name=ADAPTER_NAME)


@contextmanager
def without_attention_prompts(unet: UNet2DConditionModel) -> Iterator[None]:
    """Switches the attention prompts off while the context lasts; other people's LoRA stay as they are."""
    layers = [m for m in unet.modules() if isinstance(m, LoraLayer) and ADAPTER_NAME in m.scaling]
    scales = [layer.scaling[ADAPTER_NAME] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER_NAME] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER_NAME] = scale


def expected_shapes(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every attention projection that prompts update, by module name."""
    shapes = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        for projection in TARGET_MODULES:
            module: Any = unet.get_submodule(f"{layer}.{projection}")
            shapes[f"{layer}.{projection}"] = (module.out_features, module.in_features)
    return shapes


def _weight_file(path: Path) -> Path:
    if path.is_dir():
        for name in _WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise DSDError(f"The checkpoint folder {path} holds none of {', '.join(_WEIGHT_FILES)}.")
    if not path.is_file():
        raise DSDError(f"There is no checkpoint at {path}: give a folder or a weight file that exists.")
    return path


def _read_tensors(file: Path, alpha_over_rank: dict[str, float]) -> dict[str, torch.Tensor]:
    """All tensors of a weight file, float32 on the CPU; fills in the scales that PEFT's metadata asks for."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            for key in tensors:
                if key.endswith(".lora_B.weight") and (alpha := metadata.get("unet.lora_alpha")) is not None:
                    alpha_over_rank[key.removeprefix("unet.")] = alpha / metadata["unet.r"]
        else:
            # weights_only refuses every pickle that would do more than fill tensors
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DSDError(f"{file} cannot be read ({first_line(error)}): copy or download it again.") from error
    except Exception as error:  # unpickling raises anything; torch's own text advises to load it unsafely
        raise DSDError(
            f"{file} is refused: it is no checkpoint, or holds more than tensors. Give DSD's or the paper's own."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise DSDError(f"{file} is not a dictionary of tensors: is it a checkpoint of DSD?")
    for key, tensor in tensors.items():
        if not _is_plain(tensor):
            raise DSDError(f"{file} holds {str(key)!r} in a form that no weight has: is it a checkpoint of DSD?")
    return {str(key): tensor.float() for key, tensor in tensors.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix of floating-point numbers of its own: not sparse, not one number repeated, …"""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DSDError(f"{file} cannot be read ({first_line(error)}): copy the checkpoint again.") from error
    if not isinstance(settings, dict) or not (
        settings.get("halves", "cond") in ("both", "cond")
        and isinstance(weight := settings.get("attention_weight", 1.0), (int, float))
        and 0 <= weight <= sys.float_info.max  # an int may be too large for a float
        and isinstance(settings.get("untuned_denoising", False), bool)
    ):
        raise DSDError(f"{file} does not hold the settings of a DSD checkpoint: copy the checkpoint again.")
    return settings
