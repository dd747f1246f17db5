"""Checkpoints of a training: whole or not there at all, and enough in each to go on bit for bit.

    pytorch_lora_weights.safetensors    the attention prompts, as Diffusers' `load_lora_weights` reads them
    dsd_settings.json                   every setting of the training, the step, what was measured
    training_state.pt                   optimizer, learning rate schedule, gradient scaler, step, random numbers

What a training draws (order, timesteps, noise) depends on its seed and the step alone, so the step is the sampler's
position; the generators' state is kept for what a library might draw.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from diffusers_dsd.errors import DSDError
from diffusers_dsd.prompts import SETTINGS_NAME, WEIGHTS_NAME

STATE_NAME = "training_state.pt"
BEST_NAME = "best-checkpoint"


def save_checkpoint(
    folder: Path, prompts: dict[str, torch.Tensor], settings: dict[str, Any], state: dict[str, Any]
) -> None:
    """Writes a checkpoint under a temporary name and renames it, in the place of one of the same name.

    Raises:
        DSDError: it cannot be written; what was there before is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {f"unet.{name}": tensor.contiguous() for name, tensor in prompts.items()}
        # not save_file, which takes the right to read from everybody else
        (temporary / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        (temporary / SETTINGS_NAME).write_text(json.dumps(settings, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        torch.save(state, temporary / STATE_NAME)
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        replace_folder(temporary, folder)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise DSDError(
            f"The checkpoint {folder} cannot be written ({error}): free some space or choose another --output_dir."
        ) from error


def replace_folder(new: Path, target: Path) -> None:
    """Renames a folder to `target`; a folder that was there is moved aside first and removed last."""
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def finish_replacing(output_dir: Path) -> None:
    """Puts back what a kill inside `replace_folder` left aside."""
    for aside in output_dir.glob(".*.old") if output_dir.is_dir() else []:
        target = aside.with_name(aside.name[1:].removesuffix(".old"))
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)


def checkpoints_in(output_dir: Path, train_data: str) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a training, (step, folder), oldest first."""
    pattern = re.compile(rf"{re.escape(train_data)}-checkpoint-(\d+)|final-checkpoint-(\d+)")
    found = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else []:
        if (match := pattern.fullmatch(folder.name)) and (folder / STATE_NAME).is_file():
            found.append((int(match[1] or match[2]), folder))
    return sorted(found)


def remove_oldest(output_dir: Path, train_data: str, keep: int) -> None:
    """Removes all but the newest `keep` numbered checkpoints; the final and the best one stay."""
    numbered = [folder for _, folder in checkpoints_in(output_dir, train_data) if not folder.name.startswith("final")]
    for folder in numbered[: max(0, len(numbered) - keep)]:
        shutil.rmtree(folder)


def find_checkpoint(wanted: str, output_dir: Path, train_data: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None for "latest" where there is none yet.

    Raises:
        DSDError: the path is not a checkpoint of a training.
    """
    if wanted == "latest":
        found = checkpoints_in(output_dir, train_data)
        return found[-1][1] if found else None
    # a bare name is looked for in the output folder, as Diffusers' scripts do
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / STATE_NAME).is_file():
            return folder
    raise DSDError(
        f"--resume_from_checkpoint {wanted} is not a checkpoint of a training (it has no {STATE_NAME}): give a "
        f"checkpoint folder, or latest."
    )


def load_state(folder: Path, expected: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and training state of a checkpoint to go on from.

    Args:
        folder: the checkpoint.
        expected: settings that must be as they were.

    Raises:
        DSDError: it is damaged, or of a training with other settings (the first difference is named).
    """
    try:
        settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
        state = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise DSDError(f"The checkpoint {folder} cannot be read: resume from an earlier one.") from error
    for name, new in json.loads(json.dumps(expected)).items():
        if settings.get(name) != new:
            raise DSDError(
                f"The checkpoint {folder} is of a training with {name} {settings.get(name)}, not {new}: give the "
                f"same value to resume it, or choose another --output_dir to start anew."
            )
    return settings, state
