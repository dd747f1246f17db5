"""What `make demo` runs: the bundled model on four Shapes benchmarks, a table, and a picture of some items.

    python assets/demo.py

Each benchmark is an ordinary run of dsd_infer.py, printed before it starts, so that it can be repeated by hand.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # the picture goes to a file, also where there is no screen
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from custom_datasets import Item, get_dataset  # noqa: E402

BENCHMARKS = ("Shapes_sub", "Shapes_obj", "Shapes_verb", "Shapes_text")
# The denoising score, because the attention score says little before attention prompts are learned.
FLAGS = "--score denoising --sampling_time_steps 10 --limit 300 --batchsize 64"
SHOWN = 3  # items of each benchmark in the picture
RIGHT, WRONG = "tab:green", "tab:red"


def main() -> None:
    folder = ROOT / "results" / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    processes = torch.cuda.device_count() or min(4, os.cpu_count() or 1)
    # One thread for each CPU process: two programs that both think the cores theirs are many times slower.
    environment = os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    for name in BENCHMARKS:
        flags = f"--val_data {name} {FLAGS} --results_dir {shlex.quote(str(folder / name))}"
        print(f"\n$ accelerate launch --num_processes {processes} dsd_infer.py {flags}", flush=True)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*launch, str(ROOT / "dsd_infer.py"), *shlex.split(flags)]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode:
            sys.exit(done.returncode)
    print(f"\n{'benchmark':<12} {'figure':<32} {'value':>6}   95 % interval      n")
    for name in BENCHMARKS:
        for figure, row in read_json(folder / name / "results.json")["metrics"].items():
            interval = f"{row['low']:.3f} - {row['high']:.3f}"
            print(f"{name:<12} {figure:<32} {row['value']:>6.3f}   {interval}  {row['n']:>5}")
    picture = folder / "demo.png"
    draw(folder, picture)
    print(f"\nSome of the items with their scores: {picture}")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def draw(folder: Path, picture: Path) -> None:
    """The first items of every benchmark: pictures, sentences and scores; the right candidate has a green frame."""
    figure = plt.figure(figsize=(13, 10), layout="constrained")
    figure.suptitle("shapes-sd as an image-text matcher: denoising score, higher fits better, green is the right one")
    rows = figure.subfigures(len(BENCHMARKS), 1, hspace=0.04)
    for row, name in zip(rows, BENCHMARKS, strict=True):
        row.suptitle(name, x=0.01, ha="left", weight="bold")
        with (folder / name / "scores.jsonl").open(encoding="utf-8") as lines:
            records = [json.loads(next(lines)) for _ in range(SHOWN)]
        dataset = get_dataset(
            name, ROOT.parent, resize=32, seed=read_json(folder / name / "results.json")["settings"]["seed"]
        )
        for part, record in zip(row.subfigures(1, SHOWN), records, strict=True):
            (draw_texts if len(record["texts"]) > 1 else draw_images)(part, dataset[record["index"]], record)
    figure.savefig(picture, dpi=110)


def draw_images(part: Any, item: Item, record: dict[str, Any]) -> None:
    """1 sentence above 2 pictures with their scores."""
    part.suptitle(item.texts[0], fontsize=9, style="italic")
    for i, axes in enumerate(part.subplots(1, len(item.images))):
        axes.imshow(item.images[i])
        frame(axes, RIGHT if i == item.label else WRONG)
        axes.set_xlabel(f"{record['scores'][i][0]:+.3f}", fontsize=9)


def draw_texts(part: Any, item: Item, record: dict[str, Any]) -> None:
    """1 picture beside its 10 sentences, best first, as bars."""
    left, right = part.subplots(1, 2, width_ratios=[1, 2.6])
    left.imshow(item.images[0])
    frame(left, "black")
    scores = record["scores"][0]
    order = sorted(range(len(scores)), key=scores.__getitem__)
    right.barh(
        range(len(order)), [scores[i] for i in order], color=[RIGHT if i == item.label else WRONG for i in order]
    )
    right.set_yticks(range(len(order)), [item.texts[i] for i in order], fontsize=5)
    right.tick_params(axis="x", labelsize=6)
    right.axvline(0, color="black", linewidth=0.5)


def frame(axes: Any, colour: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=3)


if __name__ == "__main__":
    main()
