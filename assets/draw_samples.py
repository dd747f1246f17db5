"""Draws held-out sentences with the bundled shapes-sd, next to real scenes: assets/shapes-sd-samples.png.

python assets/draw_samples.py
"""

import argparse
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import StableDiffusionPipeline

from diffusers_dsd.shapes import Scene, all_scenes, draw

HERE = Path(__file__).resolve().parent
COLUMNS = 6  # pairs of a sample and a real scene in a row
SAMPLES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw held-out sentences with shapes-sd, next to real scenes.")
    parser.add_argument("--model", type=Path, default=HERE / "shapes-sd", help="folder of the pipeline")
    parser.add_argument("--output", type=Path, default=HERE / "shapes-sd-samples.png", help="the picture")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, noise and real scenes")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="classifier-free guidance")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    scenes = [rng.choice([scene, scene.mirrored]) for scene in rng.sample(all_scenes("test"), SAMPLES)]
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(
        [scene.sentence for scene in scenes],
        num_inference_steps=50,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    figure = show(scenes, samples, [draw(scene, rng).image for scene in scenes])
    figure.savefig(args.output, dpi=110)
    print(f"Saved {args.output}.")


def show(scenes: list[Scene], samples: list, real: list) -> plt.Figure:
    """A figure of each sample (left) beside a real scene of the same sentence (right), the sentence above."""
    rows = -(-len(scenes) // COLUMNS)
    figure = plt.figure(figsize=(2.6 * COLUMNS, 1.75 * rows + 0.3), layout="constrained")
    figure.suptitle("Held-out sentences: left drawn by shapes-sd, right a real scene", fontsize=11)
    cells = figure.subfigures(rows, COLUMNS, squeeze=False).flat
    for cell, scene, *pair in zip(cells, scenes, samples, real, strict=False):
        cell.suptitle(f"{scene.first}\n{scene.relation} {scene.second}", fontsize=9)
        for axes, image in zip(cell.subplots(1, 2), pair, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.axis("off")
    return figure


if __name__ == "__main__":
    main()
