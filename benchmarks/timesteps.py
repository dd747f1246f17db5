"""Learns weights of timesteps and scored layers from training items, and compares them with plain averages.

    python -m benchmarks.timesteps --train_data ShapesShift --val_data ShapesShift --output weights-folder
    accelerate launch dsd_infer.py --val_data ShapesShift --weights weights-folder

Both terms of all candidates are computed at the 40 timesteps of the full grid, once. A fit with an L1 penalty on half
of the training items orders the timesteps by what they contribute; the K first are fitted again, and the penalty that
ranks the other half best is taken. No held-out item has a part in it. Plain averages take the grid of K timesteps. The
cost is the same: K calls for every candidate, and for the empty text where the denoising term counts.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from custom_datasets import get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.metrics import bootstrap_interval
from diffusers_dsd.models import load_pipeline
from diffusers_dsd.prepared import PreparedItems
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.timestep_weights import FILE_NAME, TimestepWeights, fit_weights
from diffusers_dsd.training_data import examples_of

GRID = 40
BUDGETS = (1, 2, 5, 10, 20)
PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
GROUP = 10  # items scored together


def differences(pipe: DSDPipeline, name: str, count: int, args: argparse.Namespace, **mode: Any) -> list[np.ndarray]:
    """Right minus wrong of every example's candidates, each (wrong ones, T, L + 1): A of L layers, then B."""
    dataset = get_dataset(name, args.data_root, resize=pipe.resolution, seed=args.seed, **mode)
    found = []
    for start in tqdm(range(0, min(count, len(dataset)), GROUP), desc=name):
        items = [dataset[index] for index in range(start, min(start + GROUP, count, len(dataset)))]
        halves, untuned = pipe.resolve_halves("auto"), pipe.resolve_untuned_denoising(None)
        prepared = PreparedItems(pipe, [(i.images, i.texts) for i in items], 64, halves, args.seed, untuned)
        terms = prepared.score([pair for pairs in prepared.pairs for pair in pairs], timestep_grid(GRID), "hybrid")
        features = np.concatenate([terms.layers.numpy(), terms.denoising.numpy()[..., None]], axis=2)  # (T, P, L + 1)
        start_of_item = 0
        for item, pairs in zip(items, prepared.pairs, strict=True):
            for example in examples_of(item):
                places = [start_of_item + i * len(item.texts) + j for i, j, _ in example.candidates]
                right = places.pop(example.positive)
                found.append((features[:, [right]] - features[:, places]).swapaxes(0, 1))
            start_of_item += len(pairs)
    return found


def share_right(examples: list[np.ndarray], weights: np.ndarray) -> float:
    """Of the examples, how many rank the right candidate above all wrong ones."""
    return float(np.mean([((example * weights).sum((1, 2)) > 0).all() for example in examples]))


def choose(examples: list[np.ndarray], budget: int) -> np.ndarray:
    """Weights (T, L + 1) of at most `budget` timesteps, from training examples alone."""
    half = len(examples) // 2
    fit, check = np.concatenate(examples[:half]), examples[half:]
    best, best_right, best_penalty = np.zeros(fit.shape[1:]), -1.0, PENALTIES[0]
    for penalty in PENALTIES:
        weights = fit_few(fit, budget, penalty)
        if (right := share_right(check, weights)) > best_right:
            best, best_right, best_penalty = weights, right, penalty
    return fit_few(np.concatenate(examples), budget, best_penalty) if best.any() else best


def fit_few(examples: np.ndarray, budget: int, penalty: float) -> np.ndarray:
    """A fit of all timesteps, then one of those that contributed most to it."""
    spread = np.sqrt(np.square(examples).mean(0))  # (T, L + 1)
    contribution = (fit_weights(examples, penalty) * spread).sum(1)
    kept = np.sort(np.argsort(-contribution)[:budget])
    weights = np.zeros(examples.shape[1:])
    weights[kept] = fit_weights(examples[:, kept], penalty)
    return weights


def plain(budget: int, num_features: int, attention: float, denoising: float) -> np.ndarray:
    """The plain average over the grid of `budget` timesteps, as weights (T, L + 1)."""
    weights = np.zeros((GRID, num_features))
    places = [timestep_grid(GRID).index(timestep) for timestep in timestep_grid(budget)]
    weights[places, :-1] = attention / (num_features - 1)
    weights[places, -1] = denoising
    return weights


def cell(examples: list[np.ndarray], weights: np.ndarray) -> str:
    right = round(share_right(examples, weights) * len(examples))
    low, high = bootstrap_interval(right, len(examples))
    return f"{right / len(examples):.3f} ({low:.3f} - {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes-sd", help="(default: shapes-sd)")
    add("--checkpoint", type=Path, help="attention prompts (default: none)")
    add("--train_data", default="ShapesShift", help="(default: ShapesShift)")
    add("--train_items", type=int, default=300, help="training items (default: 300)")
    add("--val_data", default="ShapesShift", help="held-out items (default: ShapesShift)")
    add("--limit", type=int, default=600, help="held-out items (default: 600)")
    add("--data_root", type=Path, default=Path(".."), help="as for dsd_infer.py")
    add("--seed", type=int, default=1, help="(default: 1)")
    add("--budget", type=int, default=10, help="timesteps of the weights that are kept (default: 10)")
    add("--output", type=Path, help="folder to write the weights to, such as that of the attention prompts")
    args = parser.parse_args()
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.checkpoint:
        pipe.load_attention_prompts(args.checkpoint)
    train = differences(pipe, args.train_data, args.train_items, args, mode="train")
    held_out = differences(pipe, args.val_data, args.limit, args)
    features = train[0].shape[2]
    weight = pipe.resolve_attention_weight(None)
    print(f"trained on {len(train)} examples of {args.train_items} items, held-out items: {len(held_out)}\n")
    print("| timesteps | attention | denoising | hybrid | learned weights |\n|---|---|---|---|---|")
    for budget in BUDGETS:
        averages = [plain(budget, features, a, b) for a, b in ((1, 0), (0, 1), (weight, 1))]
        learned = choose(train, budget)
        print(f"| {budget} | " + " | ".join(cell(held_out, weights) for weights in (*averages, learned)) + " |")
    averages = [plain(GRID, features, a, b) for a, b in ((1, 0), (0, 1), (weight, 1))]
    print(f"| {GRID} | " + " | ".join(cell(held_out, weights) for weights in averages) + " | |")
    if args.output:
        weights = choose(train, args.budget)
        kept = [place for place in range(GRID) if weights[place].any()]
        TimestepWeights(
            timesteps=[timestep_grid(GRID)[place] for place in kept],
            attention=weights[kept, :-1].tolist(),
            denoising=weights[kept, -1].tolist(),
            halves=pipe.resolve_halves("auto"),
            untuned_denoising=pipe.resolve_untuned_denoising(None),
            about={"train_data": args.train_data, "train_items": args.train_items, "seed": args.seed},
        ).save(args.output / FILE_NAME)
        print(f"The weights of {len(kept)} timesteps are in {args.output / FILE_NAME}")


if __name__ == "__main__":
    main()
