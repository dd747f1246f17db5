"""Reading pickles from the internet: data only, never code."""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

from diffusers_dsd.errors import DSDError, first_line

# RefCOCOg's annotations are about 40 MB. A pickle that is much larger is something else.
MAX_BYTES = 1_000_000_000
# CPython overflows its stack, and dies, when it hashes 150,000 tuples inside each other.
MAX_TUPLES = 60_000
_PLAIN = (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, bool, type(None))


class _Forbidden(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    """Sets are the only plain containers that a pickle has to import; every other import is refused."""

    imported = False

    def find_class(self, module: str, name: str) -> Any:
        self.imported = True
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise _Forbidden(f"{module}.{name}")


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """What a pickle holds, if that is made of plain containers, numbers, strings, booleans and None alone.

    Python 2's byte strings come back as `str`: read as UTF-8, or as Latin-1 where they are not.

    Raises:
        DSDError: the file is missing or damaged, or would import anything (code is refused, not run).
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DSDError(f"{path} has over {MAX_BYTES:,} bytes, too many for annotations: download it again.")
        data = path.read_bytes()
    except OSError as error:
        raise DSDError(f"{path} cannot be read ({error.strerror}): check the path and the file.") from None
    try:
        _check_size(data)
        try:
            return _load(data, "utf-8")
        except UnicodeDecodeError:
            return _load(data, "latin-1")
    except _Forbidden as error:
        raise DSDError(
            f"{path} is refused, as it would run code ({first_line(error)}) where only lists, dicts, numbers and "
            "strings belong: download the original file again."
        ) from None
    except Exception as error:  # a damaged pickle can end in any exception, MemoryError included
        raise DSDError(f"{path} is not a whole pickle file ({first_line(error)}): download it again.") from error


def _check_size(data: bytes) -> None:
    """Raises ValueError for what would kill the process: endless tuples, or one number that asks for all its memory."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.startswith("TUPLE"):
            tuples += 1
        elif opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
            raise ValueError("it numbers an object beyond its own length")
    if tuples > MAX_TUPLES:
        raise ValueError(f"it holds over {MAX_TUPLES:,} tuples")


def _load(data: bytes, encoding: str) -> Any:
    unpickler = _PlainUnpickler(io.BytesIO(data), encoding=encoding)
    value = unpickler.load()
    if unpickler.imported:  # a set was made, or the type itself is in there
        _check_plain(value)
    return value


def _check_plain(value: Any) -> None:
    """Raises `_Forbidden` where something else than plain values is in a container."""
    seen, todo = set(), [value]
    while todo:
        one = todo.pop()
        if type(one) not in _PLAIN:
            raise _Forbidden(getattr(one, "__qualname__", type(one).__name__))
        if isinstance(one, (list, tuple, set, frozenset, dict)) and id(one) not in seen:
            seen.add(id(one))
            todo.extend(one)
            todo.extend(one.values() if isinstance(one, dict) else ())
