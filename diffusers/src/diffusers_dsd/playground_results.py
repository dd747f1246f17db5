"""Results folders of dsd_infer.py for the playground: which there are, and what is in one."""

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_dsd.errors import DSDError
from diffusers_dsd.metrics import Figure
from diffusers_dsd.results import RESULTS_NAME, SCORES_NAME, load_records


@dataclass(frozen=True)
class Results:
    """A finished evaluation.

    Attributes:
        figures: by name.
        settings: of the run.
        margins: of every scored item, see `margin`.
        wrong: records of the items with the lowest margins that are not above 0, lowest first.
    """

    figures: dict[str, Figure]
    settings: dict[str, Any]
    margins: list[float]
    wrong: list[dict[str, Any]]


def results_folders(root: Path) -> list[str]:
    """Names, relative to `root`, of the folders in it that hold a finished evaluation; newest first."""
    found = [file.parent for file in root.rglob(RESULTS_NAME) if (file.parent / SCORES_NAME).is_file()]
    found.sort(key=lambda folder: (folder / RESULTS_NAME).stat().st_mtime, reverse=True)
    return [str(folder.relative_to(root)) for folder in found]


def read_results(root: Path, name: str, most_wrong: int) -> Results:
    """The evaluation in the folder `name` of `root`.

    Args:
        root: what may be read from.
        name: one of `results_folders(root)`, chosen by somebody who is not trusted.
        most_wrong: how many wrong items are kept.

    Raises:
        DSDError: it is not one of them, or holds something else than results.
    """
    if name not in results_folders(root):
        raise DSDError(f"There are no results {name!r}: choose one of the list, or press Refresh.")
    folder = root / name
    inside = root.resolve()
    if not all((folder / file).resolve().is_relative_to(inside) for file in (RESULTS_NAME, SCORES_NAME)):
        raise DSDError(f"The results {name!r} are a link to somewhere else, which the page does not follow.")
    margins: list[float] = []

    def wrong() -> Iterator[tuple[float, int, dict[str, Any]]]:
        for record in load_records(folder / SCORES_NAME):
            if "error" in record:  # skipped
                continue
            margins.append(margin(record["scores"], record["label"]))
            if margins[-1] <= 0:
                yield margins[-1], record["index"], record

    try:
        summary = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
        lowest = heapq.nsmallest(most_wrong, wrong(), key=lambda entry: entry[:2])
        figures = {key: Figure(**figure) for key, figure in summary["metrics"].items()}
        return Results(figures, dict(summary["settings"]), margins, [record for _, _, record in lowest])
    except DSDError as error:  # names the file, and where it is
        raise DSDError(str(error).replace(str(folder), name)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DSDError(f"The folder {name!r} does not hold results of dsd_infer.py as they were written.") from error


def margin(scores: list[list[float]], label: int | None) -> float:
    """By how much the right candidate beats the best wrong one: above 0 is right.

    Args:
        scores: a list over images of lists over texts.
        label: index of the right image or text. None where text i belongs to image i: then the least of the
            comparisons of a right pair with a wrong one of the same image or the same text.
    """
    if label is None:
        (s00, s01), (s10, s11) = scores
        return min(s00, s11) - max(s01, s10)
    flat = [score for row in scores for score in row]
    return flat[label] - max(score for place, score in enumerate(flat) if place != label)
