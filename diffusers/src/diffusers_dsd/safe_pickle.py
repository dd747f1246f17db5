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
_HASH_STEPS = 100  # for each byte of a pickle, that hashing its tuples may take
_ADD_TO_A_CONTAINER = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")
_MARK: list[int] = [0]
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
    """Raises ValueError for what would kill or stall the process: a number that asks for its memory, or a hash bomb."""
    has_tuples = False
    for opcode, argument, _ in pickletools.genops(data):
        has_tuples |= "TUPLE" in opcode.name
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
            raise ValueError("it numbers an object beyond its own length")
    if has_tuples:  # RefCOCOg has none, and need not wait
        _check_tuples(data)


def _check_tuples(data: bytes) -> None:
    """Raises ValueError where hashing all values wherever they stand would take many more steps than there are bytes.

    Tuples may be keys, and Python hashes the whole of one each time: 40 of which each holds the one before twice would
    keep it busy for ever, and 150,000 inside each other overflow its stack. This follows the pickle's opcodes as the
    unpickler does, with the steps that each value takes in its place.
    """
    stack: list[list[int]] = []  # of each value its steps, in a list of one number that all share who refer to it
    memo: dict[int, list[int]] = {}
    steps, most = 0, _HASH_STEPS * len(data)
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "MEMOIZE" or "PUT" in name:
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _ADD_TO_A_CONTAINER:
            *new, container = _popped(stack, opcode)
            container[0] += sum(value[0] for value in new)
            stack.append(container)
        else:
            if name == "DUP":
                value = stack[-1]
            elif "GET" in name:
                value = memo[argument]
            else:
                value = [1 + sum(part[0] for part in _popped(stack, opcode))]
            if opcode.stack_after:
                stack.append(value)
                steps += value[0]
            if steps > most:
                raise ValueError("its tuples hold each other too often")


def _popped(stack: list[list[int]], opcode: pickletools.OpcodeInfo) -> list[list[int]]:
    """Takes from the stack what an opcode takes, the top one first."""
    taken, fixed = [], len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        while (value := stack.pop()) is not _MARK:
            taken.append(value)
        fixed = opcode.stack_before.index(pickletools.markobject)
    return taken + [stack.pop() for _ in range(fixed)]


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
