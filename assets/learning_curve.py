"""Draws accuracy over training steps from the validations that dsd_train.py left.

    python assets/learning_curve.py output/attention output/hybrid --output assets/learning-curve.png

Every panel is one training (a folder of dsd_train.py with --validation), every line one figure with its 95 % interval.
The point before the training is an evaluation with the same settings in the folder of step 0:

    accelerate launch dsd_infer.py --val_data Shapes --score attention --limit 500 --sampling_time_steps 10 \
        --results_dir output/attention/validation/step-0
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # the picture goes to a file, also where there is no screen
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw learning curves from the validations of dsd_train.py.")
    parser.add_argument("trainings", type=Path, nargs="+", help="output folders of dsd_train.py")
    parser.add_argument("--output", type=Path, default=Path("learning-curve.png"), help="picture to write")
    args = parser.parse_args()
    figure, panels = plt.subplots(
        1, len(args.trainings), figsize=(5 * len(args.trainings), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, training in zip(panels[0], args.trainings, strict=True):
        runs = {int(path.parent.name.split("-")[1]): path for path in training.glob("validation/step-*/results.json")}
        if not runs:
            parser.error(f"{training} holds no validations: train with --validation.")
        steps = sorted(runs)
        results = [json.loads(runs[step].read_text(encoding="utf-8")) for step in steps]
        for name in results[0]["metrics"]:
            if "/" in name:
                continue  # a part of the items only: too few of them for a curve
            rows = [result["metrics"][name] for result in results]
            (line,) = axes.plot(steps, [row["value"] for row in rows], marker="o", label=f"{name} (n={rows[0]['n']})")
            low, high = [row["low"] for row in rows], [row["high"] for row in rows]
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        settings = results[0]["settings"]
        axes.set(xlabel="step", title=f"{training.name}: {settings['val_data']}, {settings['score']} score")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("share of items right, 95 % interval")
    figure.savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    main()
