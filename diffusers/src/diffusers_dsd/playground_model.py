"""The playground's model: loaded once and shared, used by one computation at a time, which can be stopped."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusers_dsd.errors import DSDError
from diffusers_dsd.models import SHAPES_PROMPTS, SHAPES_SD, load_pipeline, resolve_model
from diffusers_dsd.pipeline import DSDPipeline

NO_CHECKPOINT = "none"


class Stopped(DSDError):
    """The computation was stopped by who asked for it, or by the end of the server."""

    def __init__(self) -> None:
        super().__init__("The computation was stopped.")


class SharedModel:
    """One pipeline in memory for all visitors.

    Args:
        model: a folder, a hub name, or "shapes-sd": loaded now.
        checkpoint: attention prompts, loaded now.
        any_model: whether visitors may name other folders and hub names. They then learn which folders exist, and may
            fill the disk with downloads.

    Raises:
        DSDError: the model or the checkpoint cannot be loaded.
    """

    def __init__(self, model: str, checkpoint: Path | None, any_model: bool) -> None:
        self.any_model = any_model
        # What visitors see is a name; the path behind it stays here.
        self.model = Path(model).name if Path(model).is_dir() else model
        self.checkpoint = checkpoint.name if checkpoint else NO_CHECKPOINT
        self._models = {self.model: model}
        self._checkpoints = {NO_CHECKPOINT: None, self.checkpoint: checkpoint}
        if SHAPES_PROMPTS.is_dir():
            self._checkpoints[SHAPES_PROMPTS.name] = SHAPES_PROMPTS
        self._turn = threading.Lock()  # held by the one who computes
        self._job: tuple[str | None, threading.Event] | None = None  # who computes, and the wish to stop it
        self._loaded_model: str = ""
        self._loaded_checkpoint: Path | None = None
        self._load(model, checkpoint)

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that can be chosen without knowing a path."""
        return list(self._checkpoints)

    @contextmanager
    def computing(
        self, session: str | None, model: str, checkpoint: str, report: Callable[[int], None]
    ) -> Iterator[tuple[DSDPipeline, Callable[[int], None]]]:
        """The pipeline, for the time of one computation, with what to give it as `on_batch`.

        Args:
            session: who asks; `stop` of the same session ends it.
            model: a name, or whatever `resolve_model` knows if any model is allowed.
            checkpoint: a name, or a path if any model is allowed.
            report: told the rows of each UNet call.

        Raises:
            DSDError: the model or checkpoint is not allowed, or cannot be loaded.
            Stopped: from `on_batch`.
        """
        wanted_model = self._allowed("model", self._models, model)
        wanted_checkpoint = self._allowed("checkpoint", self._checkpoints, checkpoint)
        with self._turn:
            stopped = threading.Event()
            self._job = (session, stopped)

            def on_batch(rows: int) -> None:
                if stopped.is_set():
                    raise Stopped
                report(rows)

            try:
                self._load(wanted_model, Path(wanted_checkpoint) if wanted_checkpoint else None)
                yield self._pipe, on_batch
            finally:
                self._job = None

    def stop(self, session: str | None) -> None:
        """Makes the computation of a session end after the UNet call that is running."""
        if session and (job := self._job) and job[0] == session:
            job[1].set()

    def close(self) -> None:
        """Ends the computation, whoever asked for it, and begins no other: the program may end when this returns."""
        if job := self._job:
            job[1].set()
        # torch aborts a program that ends in the middle of a UNet call
        self._turn.acquire()

    def resolve_score(self, score: str) -> str:
        """ "auto" is hybrid, but denoising where the attention says little: the bundled model without a checkpoint."""
        if score != "auto":
            return score
        untuned_shapes = Path(self._loaded_model) == SHAPES_SD and self._loaded_checkpoint is None
        return "denoising" if untuned_shapes else "hybrid"

    def _allowed(self, kind: str, known: dict[str, str] | dict[str, Path | None], name: str) -> str | Path | None:
        if name in known:
            return known[name]
        if not self.any_model:
            raise DSDError(f"This page is open to others: choose the {kind} among {', '.join(known)}.")
        if not name or "\0" in name:
            raise DSDError(f"There is no {kind} named: choose one of {', '.join(known)}, or give a folder.")
        return name

    def _load(self, model: str, checkpoint: Path | None) -> None:
        """Replaces what is loaded where it is something else; after a failure the old model is still there."""
        model = resolve_model(model)
        if model != self._loaded_model:
            gpu = torch.cuda.is_available()
            pipe = load_pipeline(model, torch.float16 if gpu else torch.float32)
            pipe.to("cuda" if gpu else "cpu")
            pipe.set_progress_bar_config(disable=True)
            self._pipe, self._loaded_model, self._loaded_checkpoint = pipe, model, None
        if checkpoint != self._loaded_checkpoint:
            if checkpoint:
                self._pipe.load_attention_prompts(checkpoint)
            else:
                self._pipe.unload_attention_prompts()
            self._loaded_checkpoint = checkpoint
