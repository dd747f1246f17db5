"""A results folder: one line of JSON per scored item, which a run that is killed loses at most one of.

settings.json               what the scores depend on; another run with the same settings may go on here
scores-00000.jsonl …        what each process has scored so far
scores.jsonl                all items in order, once the run is complete
results.json                figures, settings, versions
"""

import hashlib
import json
import os
import platform
import uuid
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from diffusers_dsd.errors import DSDError

SCORES_NAME = "scores.jsonl"
RESULTS_NAME = "results.json"
SETTINGS_NAME = "settings.json"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pillow", "diffusers-dsd")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all: to a temporary name, then renamed.

    Raises:
        DSDError: the file cannot be written.
    """
    write_bytes(path, _encode(text))


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` of bytes.

    Raises:
        DSDError: the file cannot be written.
    """
    with _replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON; NaN is refused.

    Raises:
        DSDError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(*paths: Path) -> str | None:
    """What files hold, for settings that must not change before a run is resumed; None without files.

    Raises:
        DSDError: a file cannot be read.
    """
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise DSDError(f"{path} cannot be read ({error.strerror or error}).") from error
    return "+".join(digests) or None


def load_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file, one by one; a half-written last line is dropped.

    Raises:
        DSDError: the file cannot be read, or a whole line of it is damaged.
    """
    for _, record in _records_with_offsets(path):
        yield record


def find_results(root: Path, settings: dict[str, Any]) -> Path:
    """The newest results folder in `root` (by when its run was first started) with these settings.

    Raises:
        DSDError: there is none; names the first difference of the newest one.
    """
    nothing = f"--resume: there is nothing to resume in {root}: leave --resume out to start anew"
    try:
        found = sorted(root.glob(f"*/{SETTINGS_NAME}"), key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)
    except OSError as error:
        raise DSDError(f"{root} cannot be read ({error.strerror or error}): give --results_dir.") from error
    if not found:
        raise DSDError(f"{nothing}.")
    differences = []
    for file in found:
        difference = _first_difference(file, settings)
        if difference is None:
            return file.parent
        differences.append(difference)
    raise DSDError(f"{nothing} (in the newest folder, {found[0].parent.name}, {differences[0]}).")


class ResultsFolder:
    """Where an evaluation writes; several processes may open the same folder.

    Args:
        path: the folder, made where it is missing.
        settings: everything the scores depend on, as JSON.

    Raises:
        DSDError: the folder cannot be written, or holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._files: dict[int, BinaryIO] = {}
        file = path / SETTINGS_NAME
        try:
            has_settings, has_scores = file.is_file(), (path / SCORES_NAME).exists()
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise _cannot_write(file, error) from error
        if has_settings:
            self._compare(file, settings)
        elif has_scores:
            raise DSDError(f"{path} holds scores without {SETTINGS_NAME}: choose another --results_dir.")
        else:
            write_json(file, settings)

    def _compare(self, file: Path, settings: dict[str, Any]) -> None:
        difference = _first_difference(file, settings)
        if difference:
            raise DSDError(f"{self.path} holds results of other settings ({difference}): choose another --results_dir.")

    def done(self, total: int) -> bytearray:
        """A byte for each of the benchmark's `total` items: 1 where any process of any run has scored it.

        Raises:
            DSDError: a file cannot be read, or holds an item that the benchmark does not have.
        """
        return bytearray(part >= 0 for part in self._places(self._parts(), total)[0])

    def finished_figures(self) -> dict[str, Any] | None:
        """The figures of results.json, which is written last of all; None where there are none yet."""
        try:
            summary = json.loads((self.path / RESULTS_NAME).read_text(encoding="utf-8"))
            return dict(summary["metrics"])
        except (OSError, ValueError, KeyError, TypeError):  # it is computed anew
            return None

    def append(self, record: dict[str, Any], shard: int) -> None:
        """Adds an item's record to a process's own shard; on disk (but for a power cut) when this returns.

        Args:
            record: holds at least "id" and "index".
            shard: the process's number; no two processes write the same one.

        Raises:
            DSDError: the file cannot be written, or the record holds NaN.
        """
        path = self.path / f"scores-{shard:05}.jsonl"
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise DSDError(f"The record of item {record['id']} holds a score that is not a number.") from error
        try:
            if shard not in self._files:
                _drop_half_line(path)
                self._files[shard] = path.open("ab")
            self._files[shard].write(_encode(line + "\n"))
            self._files[shard].flush()
        except OSError as error:
            raise _cannot_write(path, error) from error

    def close(self) -> None:
        """Ends writing: what this process appended is on the disk, and other machines that share it can see it.

        Raises:
            DSDError: a shard cannot be written.
        """
        files, self._files = self._files, {}
        for file in files.values():
            try:
                with file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(Path(file.name), error) from error

    def merge(self, total: int) -> None:
        """Puts all shards together as scores.jsonl, by index, each item once; then removes the shards.

        Args:
            total: how many items there must be.

        Raises:
            DSDError: items are missing, a shard cannot be read, or scores.jsonl not be written; the shards are still
                there then.
        """
        self.close()
        paths = self._parts()
        parts, offsets = self._places(paths, total)
        if missing := parts.count(-1):
            raise DSDError(
                f"{self.path} holds {total - missing} of {total} items, and other processes have scored the rest "
                f"elsewhere: give a --results_dir that all machines share, or copy their scores-*.jsonl into this "
                f"folder, and start the same command again."
            )
        for half_written in self.path.glob(".*.tmp"):  # by a run that was killed; nobody else writes here now
            half_written.unlink()
        target = self.path / SCORES_NAME
        with _replacing(target) as file, ExitStack() as stack:
            opened = [stack.enter_context(path.open("rb")) for path in paths]
            for part, offset in zip(parts, offsets, strict=True):
                opened[part].seek(offset)
                file.write(opened[part].readline())
        for path in paths:
            if path != target:
                path.unlink()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes results.json."""
        write_json(self.path / RESULTS_NAME, summary)

    def _places(self, paths: list[Path], total: int) -> tuple["array[int]", "array[int]"]:
        """For each item the number of the file it is in (-1: in none), and the byte its line starts at.

        12 bytes per item, as the records themselves, or a dictionary of their places, may be larger than memory.
        """
        parts, offsets = array("i", [-1]) * total, array("q", [0]) * total
        for part, path in enumerate(paths):
            for offset, record in _records_with_offsets(path):
                index = record["index"]
                if not 0 <= index < total:
                    raise DSDError(
                        f"{path} holds item {index}, but the benchmark has {total} items now: choose another "
                        f"--results_dir."
                    )
                parts[index], offsets[index] = part, offset
        return parts, offsets

    def _parts(self) -> list[Path]:
        merged = self.path / SCORES_NAME
        return ([merged] if merged.is_file() else []) + sorted(self.path.glob("scores-[0-9]*.jsonl"))


def versions() -> dict[str, str]:
    """What the figures were computed with: packages, Python, machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {package.replace("-", "_"): version(package) for package in _PACKAGES} | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }


def _first_difference(file: Path, settings: dict[str, Any]) -> str | None:
    """The first setting that is not as in a folder's settings.json, in words; None where all are.

    Raises:
        DSDError: the file cannot be read.
    """
    try:
        previous = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(previous, dict):
            raise ValueError("it holds no names and values")
    except (OSError, ValueError) as error:
        raise DSDError(f"{file} cannot be read ({error}): choose another --results_dir.") from error
    settings = json.loads(json.dumps(settings))
    for name in [*settings, *previous]:
        old, new = previous.get(name), settings.get(name)
        if old != new:
            return f"{name} was {old!r} and is now {new!r}"
    return None


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears as `path` once it is whole and on disk, and not before."""
    # not the process's number: two machines that share the folder may have the same one
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # it is gone if all went well
            temporary.unlink()


def _encode(text: str) -> bytes:
    r"""UTF-8; half a surrogate pair (from a file name in another encoding, say) as \udc80, as JSON spells it."""
    return text.encode("utf-8", errors="backslashreplace")


def _records_with_offsets(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the byte its line starts at. A last line without its end was cut by a kill: dropped."""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DSDError(f"Line {number} of {path} is damaged: choose another --results_dir.") from error
                yield offset, record
                offset += len(line)
    except OSError as error:
        raise DSDError(f"{path} cannot be read ({error.strerror or error}).") from error


def _drop_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = 0
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        file.truncate(whole)


def _cannot_write(path: Path, error: OSError) -> DSDError:
    return DSDError(f"{path} cannot be written ({error.strerror or error}): choose another folder or free some space.")
