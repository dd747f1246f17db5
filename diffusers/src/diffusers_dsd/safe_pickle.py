"""Reading pickles from the internet: data only, never code."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

from diffusers_dsd.errors import DSDError, first_line

# RefCOCOg's annotations are about 40 MB. A pickle that is much larger is something else.
MAX_BYTES = 1_000_000_000


class _Forbidden(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    """Sets are the only plain containers that a pickle has to import; every other import is refused."""

    def find_class(self, module: str, name: str) -> Any:
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
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except _Forbidden as error:
        raise DSDError(
            f"{path} is refused, as it would run code ({first_line(error)}) where only lists, dicts, numbers and "
            "strings belong: download the original file again."
        ) from None
    except Exception as error:  # a damaged pickle can end in any exception, MemoryError included
        raise DSDError(f"{path} is not a whole pickle file ({first_line(error)}): download it again.") from error
