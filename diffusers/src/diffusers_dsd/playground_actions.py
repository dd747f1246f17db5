"""What the playground's buttons and named endpoints do."""

import csv
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import to_image, to_tensor
from diffusers_dsd.playground_html import figures_table, margins_figure, matrix_table, note, thumbnail, wrong_item
from diffusers_dsd.playground_inputs import (
    MAX_SEED,
    MAX_TIMESTEPS,
    check_images,
    check_whole_number,
    open_upload,
    read_sentences,
)
from diffusers_dsd.playground_model import SharedModel
from diffusers_dsd.playground_results import read_results, results_folders
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.scoring import SCORES, num_rows
from diffusers_dsd.wordmaps import WordMaps

BATCH_SIZE = 16  # rows of a UNet call: Stop waits for one call
MOST_WRONG = 12  # items shown on the tab Benchmark
DRAWN_SIZE = 128  # pixels of a drawn benchmark's pictures on that tab
PREVIEW_SIZE = 256  # pixels
_PROGRESS = gr.Progress()  # as a default value it makes Gradio pass the request's own


@dataclass(frozen=True)
class Matrix:
    """Scores of images (rows) against texts (columns), as the endpoint /score answers.

    Attributes:
        scores, attention, denoising: lists over images of lists over texts. Both terms are there for the denoising
            score too, where the attention costs nothing; the attention score does without the denoising term.
        images, texts: what the rows and columns are.
        score: "hybrid", "attention" or "denoising".
        timesteps: that the scores are means over.
        seconds: it took.
    """

    scores: list[list[float]]
    attention: list[list[float]] | None
    denoising: list[list[float]] | None
    images: list[str]
    texts: list[str]
    score: str
    timesteps: list[int]
    seconds: float


def in_a_sentence(step: Callable[..., Any]) -> Callable[..., Any]:
    """What goes wrong appears in the page as a sentence; of what is not the visitor's fault, no detail does."""

    @wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except DSDError as error:  # Gradio would show the sentence as HTML, and it may quote a file's name
            raise gr.Error(escape(str(error), quote=False), print_exception=False) from error
        except Exception as error:
            traceback.print_exc()
            raise gr.Error(
                "Something went wrong in the playground: what it was is in the terminal that it was started from.",
                print_exception=False,
            ) from error

    return wrapped


class ProgressBar:
    """A Gradio progress bar that is told steps; `total` can be set when it is known."""

    def __init__(self, progress: gr.Progress) -> None:
        self._progress, self._done, self.total = progress, 0, 0
        progress(0, desc="waiting for the model")

    def __call__(self, steps: int) -> None:
        self._done += steps
        self._progress(min(self._done / self.total, 1.0), desc="computing")


class Playground:
    """The page's functions.

    Args:
        shared: the model.
        results_dir: the one folder that results are shown from.
        open_benchmark: makes a benchmark of its name and seed, for the pictures of its items.
    """

    def __init__(
        self, shared: SharedModel, results_dir: Path, open_benchmark: Callable[[str, int], Sequence[Any]]
    ) -> None:
        self.shared, self.results_dir, self.open_benchmark = shared, results_dir, open_benchmark

    @in_a_sentence
    def preview(self, files: str | list[str] | None) -> list[tuple[Image.Image, str]]:
        """Small copies of the uploaded pictures; says at once which cannot be read."""
        files = [files] if isinstance(files, str) else files
        pictures = map(open_upload, check_images(files) if files else [])
        return [(to_image(picture, PREVIEW_SIZE), name) for name, picture in pictures]

    def stop(self, request: gr.Request) -> None:
        """Ends this visitor's computation."""
        self.shared.stop(request.session_hash)

    # ---- Match

    @in_a_sentence
    def score(
        self,
        images: list[str],
        texts: str,
        model: str,
        checkpoint: str,
        score: str,
        sampling_steps: int,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = _PROGRESS,
    ) -> dict[str, Any]:
        """Scores every image against every line of the texts: "scores" is a list over images of lists over texts."""
        settings = model, checkpoint, score, sampling_steps, seed
        matrix, _ = self._match(images, texts, *settings, request.session_hash, ProgressBar(progress))
        return asdict(matrix)

    @in_a_sentence
    def score_page(
        self,
        images: list[str],
        texts: str,
        model: str,
        checkpoint: str,
        score: str,
        sampling_steps: int,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = _PROGRESS,
    ) -> tuple[str, str, Any]:
        """The matrix and its terms as tables, and a file to download."""
        settings = model, checkpoint, score, sampling_steps, seed
        matrix, thumbnails = self._match(images, texts, *settings, request.session_hash, ProgressBar(progress))
        table = matrix_table(matrix.scores, matrix.images, matrix.texts, thumbnails)
        table += note(
            f"{_counted(matrix.images, 'picture')}, {_counted(matrix.texts, 'sentence')}, "
            f"{_counted(matrix.timesteps, 'timestep')}, {matrix.score} score: {matrix.seconds:.1f} seconds."
        )
        table += note("▶ best sentence for a picture (in its row) · ▲ best picture for a sentence (in its column)")
        terms = ""
        for name, term in (("attention", matrix.attention), ("denoising", matrix.denoising)):
            counts = "" if matrix.score in ("hybrid", name) else " (not part of this score)"
            terms += f"<h4>{name}{counts}</h4>"
            terms += matrix_table(term, matrix.images, matrix.texts) if term else note("Was not computed.")
        # a folder of its own, so that the download has a plain name
        file = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / "dsd-scores.csv"
        _write_csv(matrix, file)
        return table, terms, gr.DownloadButton(value=str(file), interactive=True)

    def _match(
        self,
        images: list[str] | None,
        texts: str,
        model: str,
        checkpoint: str,
        score: str,
        sampling_steps: int,
        seed: int,
        session: str | None,
        bar: ProgressBar,
    ) -> tuple[Matrix, list[str]]:
        """The matrix, and a thumbnail of each image."""
        images, sentences = check_images(images), read_sentences(texts)
        sampling_steps, seed = _check_numbers(sampling_steps, seed)
        if score not in ("auto", *SCORES):
            raise DSDError(f"There is no score {score!r}: choose auto, {', '.join(SCORES)}.")
        with self.shared.computing(session, model, checkpoint, bar) as (pipe, on_batch):
            score = self.shared.resolve_score(score)
            computed = "attention" if score == "attention" else "hybrid"
            apart, halves = pipe.resolve_untuned_denoising(None), pipe.resolve_halves("auto")
            bar.total = num_rows(len(images), len(sentences), sampling_steps, computed, halves, apart)
            start = time.perf_counter()
            names, thumbnails, tensors = [], [], []
            for path in images:  # one at a time: a large picture takes much memory
                name, picture = open_upload(path)
                names.append(name)
                thumbnails.append(thumbnail(picture))
                tensors.append(to_tensor(picture, pipe.resolution))
            how = {"score": computed, "seed": seed, "batch_size": BATCH_SIZE, "on_batch": on_batch}
            output = pipe.score_items([(tensors, sentences)], sampling_steps, **how)[0]
            seconds = time.perf_counter() - start
        scores = output.denoising if score == "denoising" else output.scores
        if not scores.isfinite().all():
            raise DSDError("A score is not a number: the model needs float32 or bfloat16, or its weights are damaged.")
        terms = (None if term is None else term.tolist() for term in (output.attention, output.denoising))
        return Matrix(scores.tolist(), *terms, names, sentences, score, output.timesteps, seconds), thumbnails

    # ---- Explain

    @in_a_sentence
    def explain(
        self,
        image: str,
        text: str,
        model: str,
        checkpoint: str,
        sampling_steps: int,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = _PROGRESS,
    ) -> dict[str, Any]:
        """Words, each word's share of the attention score, and each word's map as a list of rows, from the top."""
        settings = model, checkpoint, sampling_steps, seed
        maps = self._word_maps(image, text, *settings, request.session_hash, ProgressBar(progress))
        return {"words": maps.words, "shares": maps.shares.tolist(), "maps": maps.heatmaps.tolist()}

    @in_a_sentence
    def explain_page(
        self,
        image: str,
        text: str,
        model: str,
        checkpoint: str,
        sampling_steps: int,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = _PROGRESS,
    ) -> tuple[list[tuple[Image.Image, str]], str]:
        """The picture under each word's map, and what the maps mean."""
        settings = model, checkpoint, sampling_steps, seed
        maps = self._word_maps(image, text, *settings, request.session_hash, ProgressBar(progress))
        legend = (
            "In each map apart, bright is where the picture attends to the word most, dark where least. Percent: the "
            "word's share of the attention score among the words (of the whole, start, end and padding have "
            f"{maps.special_share:.0%})."
        )
        return [(one.overlay(), f"{one.word} {one.share:.0%}") for one in maps], note(legend)

    def _word_maps(
        self,
        image: str | None,
        text: str,
        model: str,
        checkpoint: str,
        sampling_steps: int,
        seed: int,
        session: str | None,
        bar: ProgressBar,
    ) -> WordMaps:
        sentences = read_sentences(text)
        if len(sentences) > 1:
            raise DSDError(f"These are {len(sentences)} sentences: one is explained at a time.")
        sampling_steps, seed = _check_numbers(sampling_steps, seed)
        bar.total = len(timestep_grid(sampling_steps))
        _, picture = open_upload(check_images([image] if image else [])[0])
        with self.shared.computing(session, model, checkpoint, bar) as (pipe, on_batch):
            return pipe.explain(picture, sentences[0], sampling_steps, seed, BATCH_SIZE, on_batch)

    # ---- Benchmark

    @in_a_sentence
    def folders(self) -> Any:
        """The drop-down with the results folders that are there now."""
        return gr.Dropdown(choices=results_folders(self.results_dir))

    @in_a_sentence
    def benchmark(self, folder: str) -> tuple[str, Any, str]:
        """Figures, histogram of margins, and the items with the lowest margins."""
        if not folder:
            raise DSDError("No results are chosen: choose a folder of the list.")
        results = read_results(self.results_dir, folder, MOST_WRONG)
        names = ("val_data", "model", "checkpoint", "score", "sampling_time_steps", "seed")
        settings = [f"{name} {value}" for name in names if (value := results.settings.get(name)) is not None]
        figures = figures_table(results.figures) + note(", ".join(settings))

        wrong = sum(margin <= 0 for margin in results.margins)
        shown = (
            f"Wrong items: {len(results.wrong)} of {wrong:,}, the lowest margin first." if wrong else "None is wrong."
        )
        pictures = [self._pictures_of(record, results.settings) for record in results.wrong]
        if not all(pictures):
            shown += " Their pictures are not on this machine: --data_root of playground.py says where to look."
        cards = "".join(map(wrong_item, results.wrong, pictures))
        return figures, margins_figure(results.margins), f'{note(shown)}<div class="dsd-items">{cards}</div>'

    def _pictures_of(self, record: dict[str, Any], settings: dict[str, Any]) -> list[Image.Image]:
        """The pictures of an item, drawn again or opened; none where they are not there, or of another item."""
        try:
            item = self.open_benchmark(settings["val_data"], settings["seed"])[record["index"]]
            if (item.id, item.texts) != (record["id"], record["texts"]):
                return []
            return [to_image(image, DRAWN_SIZE) for image in item.images]
        except (DSDError, LookupError):
            return []


def _check_numbers(sampling_steps: Any, seed: Any) -> tuple[int, int]:
    return (
        check_whole_number("The number of timesteps", sampling_steps, 1, MAX_TIMESTEPS),
        check_whole_number("The seed", seed, 0, MAX_SEED),
    )


def _counted(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _write_csv(matrix: Matrix, file: Path) -> None:
    """A line for each pair."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["image", "text", "score", "attention", "denoising"])
        for i, image in enumerate(matrix.images):
            for j, text in enumerate(matrix.texts):
                terms = [term[i][j] if term else "" for term in (matrix.attention, matrix.denoising)]
                writer.writerow([image, text, matrix.scores[i][j], *terms])
