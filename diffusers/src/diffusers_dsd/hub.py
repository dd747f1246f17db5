"""Uploads attention prompts to the Hugging Face Hub with a model card that says how they came about."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from diffusers_dsd.errors import DSDError, first_line
from diffusers_dsd.metrics import Figure

_CARD = """---
{data}
---

# {name}

Attention prompts for [{base_model}](https://huggingface.co/{base_model}): low-rank updates of its attention that
make it a better image-text matcher ([Discriminative Diffusion Models as Few-shot Vision and Language
Learners](https://arxiv.org/abs/2305.10722)), learned from {train_data}.

```python
from diffusers_dsd import DSDPipeline

pipe = DSDPipeline.from_pretrained("{base_model}")
pipe.load_lora_weights("{name}")  # the score they were trained for: score="{score}", halves="{halves}"
```

## Measured

{figures}

## Settings

{settings}
"""


def model_card(name: str, settings: dict[str, Any], figures: dict[str, dict[str, Figure]]) -> ModelCard:
    """A card that states base model, data, settings and measured figures.

    Args:
        name: of the repository, "user/name".
        settings: of the training, as in `dsd_settings.json`.
        figures: by benchmark and figure.
    """
    data = ModelCardData(
        base_model=settings["pretrained_model_name_or_path"],
        library_name="diffusers",
        tags=["diffusers", "lora", "image-text-matching", "arxiv:2305.10722"],
    )
    rows = [
        f"| {benchmark} | {figure} | {f['value']:.3f} | {f['low']:.3f} - {f['high']:.3f} | {f['n']} |"
        for benchmark, of_benchmark in figures.items()
        for figure, f in of_benchmark.items()
    ]
    table = ["| benchmark | figure | value | 95 % interval | n |", "|---|---|---|---|---|", *rows]
    return ModelCard(
        _CARD.format(
            data=data.to_yaml(),
            name=name,
            base_model=settings["pretrained_model_name_or_path"],
            train_data=settings["train_data"],
            score=settings["score"],
            halves=settings["halves"],
            figures="\n".join(table) if rows else "Nothing was evaluated.",
            settings="\n".join(f"- `{key}`: {value}" for key, value in settings.items() if key != "metrics"),
        )
    )


def push_to_hub(folder: Path, name: str, card: ModelCard, token: str | None = None) -> str:
    """Uploads a checkpoint folder with its card; returns the address.

    Raises:
        DSDError: the Hub refuses or cannot be reached; the folder stays where it is.
    """
    try:
        card.save(folder / "README.md")
        api = HfApi(token=token)
        address = api.create_repo(name, exist_ok=True)
        # the optimizer's state is of no use to anyone who scores
        api.upload_folder(folder_path=folder, repo_id=address.repo_id, ignore_patterns=["training_state.pt"])
    except (OSError, HfHubHTTPError, ValueError) as error:
        message = f"--push_to_hub: {name} was not uploaded ({first_line(error)}); the checkpoint is in {folder}."
        raise DSDError(message) from error
    return str(address)
