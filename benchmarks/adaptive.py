"""How much work `--adaptive` saves, and how often it decides as the full grid does.

    python -m benchmarks.adaptive --output assets/adaptive.png

Scores the first items of each benchmark on the full grid, with every timestep's scores, and runs the races on them at
several confidences: a race sees the same scores that `dsd_infer.py --adaptive` would compute (tests/test_racing.py), so
one full evaluation serves all. Scores that are in --scores_dir from an earlier run are used again.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from custom_datasets import get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.metrics import bootstrap_interval
from diffusers_dsd.models import SHAPES_SD
from diffusers_dsd.racing import Race, RaceOutcome, covering_order, look_after
from diffusers_dsd.schedule import timestep_grid

BENCHMARKS = ("Shapes", "ShapesShift", "Shapes_text", "ShapesShift_text")
CONFIDENCES = (0.9, 0.95, 0.99)
GROUP = 10  # items scored together


def full_grid(pipe: DSDPipeline, name: str, args: argparse.Namespace) -> np.ndarray:
    """Every timestep's scores of the first items, (items, T, candidates), and the labels as the last candidate's."""
    file = args.scores_dir / f"{name}-{args.limit}-{args.sampling_time_steps}-{args.seed}.npz"
    if file.exists():
        return np.load(file)["scores"]
    dataset = get_dataset(name, Path(".."), resize=pipe.resolution, seed=args.seed)
    rows = []
    for start in tqdm(range(0, args.limit, GROUP), desc=name):
        items = [dataset[index] for index in range(start, min(start + GROUP, args.limit))]
        outputs = pipe.score_items(
            [(item.images, item.texts) for item in items],
            sampling_steps=args.sampling_time_steps,
            score="denoising",
            seed=args.seed,
            batch_size=64,
        )
        rows += [output.per_timestep.flatten(1).numpy() for output in outputs]
    scores = np.stack(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, scores=scores)
    return scores


def race(scores: np.ndarray, timesteps: list[int], confidence: float, seed: int) -> RaceOutcome:
    """The race of one item on its scores (T, candidates), in ascending order of the timesteps."""
    order = [timesteps.index(timestep) for timestep in covering_order(timesteps, seed)]
    contest, start = Race(scores.shape[1], len(timesteps), confidence), 0
    for stop in look_after(len(timesteps)):
        if contest.is_over:
            break
        contest.look(scores[order[start:stop]][:, contest.alive].T.tolist())
        start = stop
    return contest.outcome()


def rows_of(outcome: RaceOutcome, one_text: bool) -> int:
    """UNet rows of a race: one for each look at a candidate, and for images one more for the empty text."""
    return sum(outcome.looked) * (2 if one_text else 1)


def measure(name: str, scores: np.ndarray, confidence: float, args: argparse.Namespace) -> dict[str, float]:
    """Work of the full grid over that of the races, and the share of equal decisions."""
    timesteps, one_text = timestep_grid(args.sampling_time_steps), not name.endswith("_text")
    outcomes = [race(item, timesteps, confidence, args.seed) for item in scores]
    full = len(scores) * len(timesteps) * (2 * scores.shape[2] if one_text else scores.shape[2] + 1)
    equal = sum(outcome.winner == int(item.mean(0).argmax()) for outcome, item in zip(outcomes, scores, strict=True))
    low, high = bootstrap_interval(equal, len(scores))
    work = sum(rows_of(outcome, one_text) for outcome in outcomes)
    return {"times": full / work, "equal": equal / len(scores), "low": low, "high": high, "n": len(scores)}


def draw(results: dict[tuple[str, float], dict[str, float]]) -> Figure:
    """Saved work and agreement at each confidence, side by side."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    work, agreement = figure.subplots(1, 2)
    for number, name in enumerate(BENCHMARKS):
        places = np.arange(len(CONFIDENCES)) + 0.2 * (number - 1.5)
        found = [results[name, confidence] for confidence in CONFIDENCES]
        work.bar(places, [one["times"] for one in found], 0.18, label=name)
        equal = np.array([one["equal"] for one in found])
        errors = np.array([[e - one["low"], one["high"] - e] for e, one in zip(equal, found, strict=True)]).T
        agreement.errorbar(places, equal, errors, fmt="o", capsize=3, label=name)
    for axes, title in ((work, "work of the full grid / of the races"), (agreement, "decisions as on the full grid")):
        axes.set_xticks(range(len(CONFIDENCES)), [f"{confidence:g}" for confidence in CONFIDENCES])
        axes.set_xlabel("--adaptive")
        axes.set_title(title, fontsize=10)
    work.axhline(1, color="grey", linewidth=0.8)
    figure.legend(*work.get_legend_handles_labels(), loc="outside lower center", ncols=len(BENCHMARKS), fontsize=8)
    figure.suptitle(f"Races, n = {found[0]['n']} items each, 95 % bootstrap intervals", fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=500, help="items of each benchmark (default: 500)")
    parser.add_argument("--sampling_time_steps", type=int, default=40, help="of the full grid (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="of noise, items and order (default: 1)")
    parser.add_argument("--scores_dir", type=Path, default=Path("results/adaptive"), help="(default: results/adaptive)")
    parser.add_argument("--output", type=Path, help="PNG to write")
    args = parser.parse_args()
    pipe = DSDPipeline.from_pretrained(SHAPES_SD)
    pipe.set_progress_bar_config(disable=True)
    results = {}
    print("| benchmark | confidence | work saved | equal decisions (95 % interval) | n |\n|---|---|---|---|---|")
    for name in BENCHMARKS:
        with torch.no_grad():
            scores = full_grid(pipe, name, args)
        for confidence in CONFIDENCES:
            one = results[name, confidence] = measure(name, scores, confidence, args)
            print(
                f"| {name} | {confidence:g} | {one['times']:.1f} × | {one['equal']:.3f} "
                f"({one['low']:.3f} - {one['high']:.3f}) | {one['n']} |"
            )
    if args.output:
        draw(results).savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
