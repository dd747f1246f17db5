"""Accuracy of the score and of each of its terms, from results folders of dsd_infer.py.

    python assets/terms_table.py results/Shapes_sub results/Shapes_obj results/Shapes_verb

One evaluation with the hybrid score holds both terms of every item. Prints a table with 95 % bootstrap intervals over
items; the last line is the mean over the folders, resampled within each.
"""

import argparse
from pathlib import Path

import numpy as np

from diffusers_dsd.cli import ends_in_a_sentence
from diffusers_dsd.errors import DSDError
from diffusers_dsd.metrics import bootstrap_interval, rank_of
from diffusers_dsd.results import SCORES_NAME, load_records

TERMS = {"attention": "attention", "denoising": "denoising", "score": "scores"}
RESAMPLES = 10_000


def right_and_total(folder: Path, name: str) -> tuple[int, int] | None:
    """How many items of a folder the named term gets right, and how many are scored; None where it was not computed."""
    right = total = 0
    for record in load_records(folder / SCORES_NAME):
        if "error" in record:  # skipped
            continue
        if record[name] is None:
            return None
        if record["label"] is None:
            raise DSDError(f"{folder} is of a benchmark with two right pairs in an item: it has no accuracy.")
        right += rank_of([score for row in record[name] for score in row], record["label"]) == 0
        total += 1
    if not total:
        raise DSDError(f"{folder} holds no scored item: evaluate again.")
    return right, total


def mean_interval(counts: list[tuple[int, int]]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of several shares, resampling the items of each."""
    rng = np.random.default_rng(0)
    shares = [rng.binomial(n, right / n, RESAMPLES) / n for right, n in counts]
    low, high = np.quantile(np.mean(shares, axis=0), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="results folders of dsd_infer.py")
    args = parser.parse_args()
    with ends_in_a_sentence("terms_table.py"):
        print("| results | n | " + " | ".join(TERMS) + " |")
        print("|---" * (2 + len(TERMS)) + "|")
        counts = {term: [right_and_total(folder, name) for folder in args.folders] for term, name in TERMS.items()}
        for place, folder in enumerate(args.folders):
            cells = [cell(found[place]) for found in counts.values()]
            n = next(found[place][1] for found in counts.values() if found[place])
            print(f"| {folder.name} | {n} | " + " | ".join(cells) + " |")
        if len(args.folders) > 1:
            means = [mean_cell(found) for found in counts.values()]
            print("| mean | | " + " | ".join(means) + " |")


def cell(count: tuple[int, int] | None) -> str:
    return "" if count is None else written(count[0] / count[1], *bootstrap_interval(*count))


def mean_cell(counts: list[tuple[int, int] | None]) -> str:
    there = [count for count in counts if count]
    if len(there) < len(counts):
        return ""
    return written(sum(right / n for right, n in there) / len(there), *mean_interval(there))


def written(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} - {high:.3f})".replace("0.", ".")


if __name__ == "__main__":
    main()
