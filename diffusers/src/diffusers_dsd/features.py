"""Remembers what does not depend on a pair: latents of images, embeddings of texts, readings of the empty text."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import open_image, to_tensor
from diffusers_dsd.results import write_bytes

logger = logging.get_logger(__name__)

Tensors = dict[str, torch.Tensor]


class FeatureCache:
    """A cache for one model whose weights do not change while it is used; scores are the same with and without it.

    In memory the least recently used entries go when it is full. On disk everything stays, for later runs too: an
    entry is found again by the weights it came from and by the picture's path, size and time of change.

    Args:
        max_bytes: that the entries in memory may have.
        folder: where entries are kept on disk as well; None is nowhere.
    """

    def __init__(self, max_bytes: int = 2**30, folder: Path | None = None) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self._entries: OrderedDict[tuple, Tensors] = OrderedDict()
        self._bytes = 0
        self._fingerprints: dict[tuple, str] = {}
        self._decoded: dict[tuple, torch.Tensor] = {}
        self._lock = threading.RLock()  # pictures are looked up and read ahead in another thread

    def get(self, key: tuple) -> Tensors | None:
        """What was put under the key, on the CPU: a GPU's memory is for larger batches."""
        with self._lock:
            if (found := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                return found
        if self.folder is None:
            return None
        try:
            found = load(self._file(key).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning(f"{self._file(key)} cannot be read ({error}): it is computed again.")
            return None
        self._remember(key, found)
        return found

    def put(self, key: tuple, tensors: Tensors) -> None:
        """Keeps tensors under a key of numbers, strings and tuples of them.

        Raises:
            DSDError: the folder cannot be written.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        self._remember(key, tensors)
        if self.folder is not None:
            write_bytes(self._file(key), save(tensors))

    def _remember(self, key: tuple, tensors: Tensors) -> None:
        with self._lock:
            self._bytes += _size(tensors) - _size(self._entries.pop(key, {}))
            self._entries[key] = tensors
            while self._bytes > self.max_bytes and len(self._entries) > 1:
                self._bytes -= _size(self._entries.popitem(last=False)[1])

    def _file(self, key: tuple) -> Path:
        assert self.folder is not None
        name = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def fingerprint(self, *modules: torch.nn.Module) -> str:
        """Tells weights on disk apart. In memory nothing needs to be told apart: the weights do not change."""
        if self.folder is None:
            return ""
        parts = []
        for module in modules:
            # LoRA that is switched on or off changes no weight, so the names of what is on count as well.
            adapters = [str(getattr(m, "active_adapters", "")) for m in module.modules() if hasattr(m, "lora_A")]
            off = [bool(getattr(m, "disable_adapters", False)) for m in module.modules() if hasattr(m, "lora_A")]
            key = (id(module), str(module.dtype), *adapters, *off)
            if key not in self._fingerprints:
                digest = hashlib.blake2b(repr((str(module.dtype), adapters, off)).encode(), digest_size=16)
                for name, tensor in module.state_dict().items():
                    digest.update(name.encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
                self._fingerprints[key] = digest.hexdigest()
            parts.append(self._fingerprints[key])
        return "-".join(parts)

    # ---- pictures

    def decode(self, paths: Sequence[str | os.PathLike], resolution: int) -> list[str | os.PathLike]:
        """Reads picture files ahead for `pixels`, and says which; those that cannot be read are left for it to name."""
        readable = {}
        for image in paths:
            if (key := image_key(image, resolution)) is None:
                continue
            try:
                if key not in self._decoded:
                    self._decoded[key] = to_tensor(open_image(image), resolution)
            except DSDError:
                continue
            readable[key] = image
        return list(readable.values())

    def discard(self, images: Sequence[Any], resolution: int) -> None:
        """Forgets what was read ahead of pictures that nobody will ask for any more."""
        for image in images:
            if (key := image_key(image, resolution)) is not None:
                self._decoded.pop(key, None)

    def pixels(self, path: str | os.PathLike, resolution: int) -> torch.Tensor:
        """The picture in a file, (3, R, R) in [-1, 1].

        Raises:
            DSDError: it cannot be read.
        """
        key = image_key(path, resolution)
        decoded = self._decoded.pop(key, None) if key is not None else None
        return to_tensor(open_image(path), resolution) if decoded is None else decoded


def image_key(image: Any, resolution: int) -> tuple | None:
    """What a picture file is known by; None for pictures without a file, and for files that are not there."""
    if isinstance(image, (Image.Image, torch.Tensor)):
        return None
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return None
    return os.path.abspath(image), status.st_mtime_ns, status.st_size, resolution


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
