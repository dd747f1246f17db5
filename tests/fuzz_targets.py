"""What is fuzzed: for each reader of foreign files, how its input is made up and what must hold.

Every target gets a file's content. It must give a valid value or raise `DSDError` in one line, whatever the content,
and never start a program, open a connection, or write, rename or remove a file. `test_fuzz.py` runs some hundred cases
of each, `fuzz_long.py` as many as one likes.
"""

import atexit
import io
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from conftest import GOLDEN
from custom_datasets import get_dataset
from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import open_image, to_tensor
from diffusers_dsd.prompts import check_prompts_fit, expected_shapes, read_attention_prompts
from diffusers_dsd.safe_pickle import load_plain_pickle
from trees import binary_lines, comvg_rows, refcocog_annotations, vqa_rows, winoground_examples

MEMORY = 4 * 2**30  # more than a reader may take: a case that asks for it ends in MemoryError instead of swapping
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.", "pty.")
FORBIDDEN += ("socket.", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link")
FOLDER = Path(tempfile.mkdtemp(prefix="dsd-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

_armed = False
_seen: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if not _armed:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event.startswith(FORBIDDEN) or writes:
        _seen.append(f"{event} {arguments}")


def harmless(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None where it raises `DSDError`; anything else it raises or does is a failure."""
    global _armed
    if _watch not in _installed:
        sys.addaudithook(_watch)
        _installed.append(_watch)
    _seen.clear()
    _armed = True
    try:
        return read()
    except DSDError as error:
        assert str(error) and "\n" not in str(error), f"not one line: {str(error)!r}"
        return None
    finally:
        _armed = False
        assert not _seen, _seen


_installed: list[Any] = []


def limit_memory() -> Callable[[], None]:
    """Gives this process `MEMORY` more than it has; returns what undoes that."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, before)


# ---- how content is made up


def damaged(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """One of the seeds, cut off somewhere, with some bytes replaced and some put in."""
    edits = st.lists(st.tuples(st.integers(0, 2**20), st.booleans(), st.binary(min_size=1, max_size=6)), max_size=6)

    def apply(seed: bytes, edits: list[tuple[int, bool, bytes]], keep: float) -> bytes:
        data = bytearray(seed)
        for place, insert, new in edits:
            place %= len(data) + 1
            data[place : place + (0 if insert else len(new))] = new
        return bytes(data[: int(keep * len(data))])

    keep = st.one_of(st.just(1.0), st.floats(0, 1))
    return st.one_of(st.binary(max_size=200), st.builds(apply, st.sampled_from(seeds), edits, keep))


class Payload:
    """Pickles as a call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call[0], call[1:]

    def __reduce__(self) -> tuple:
        return self.call


PAYLOADS = [Payload(os.system, "true"), Payload(eval, "1"), Payload(os.mkdir, str(FOLDER / "made")), Payload(open, "x")]
LARGE = st.builds(pow, st.just(10), st.just(5000))  # built late: it has too many digits to be printed
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), LARGE)
LEAVES = st.one_of(st.none(), NUMBERS, st.text(max_size=20), st.binary(max_size=9))
PLAIN = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner), max_leaves=20
)
# opcodes that take no argument, any number of them, and some with one
OPCODES = st.one_of(
    st.sampled_from(
        [bytes([code]) for code in b"().012NQR]Xabdehloqrstu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"]
    ),
    st.sampled_from([b"K\x01", b"I7\n", b"Va\n", b"S'a'\n", b"q\x00", b"h\x00", b"\x80\x02", b"\x80\x04", b"p0\n"]),
    st.sampled_from([b"cbuiltins\nset\n", b"cbuiltins\nfrozenset\n", b"cos\nsystem\n", b"(S'true'\nios\nsystem\n"]),
    st.sampled_from([b"\x8c\x03a\nb", b"\x8c\x02os", b"\x8c\x06system", b"cbuiltins\neval\n", b"\x82\x01"]),
)
PICKLES = st.one_of(
    st.builds(pickle.dumps, PLAIN, st.integers(2, 5)),
    st.builds(lambda codes: b"".join([*codes, b"."]), st.lists(OPCODES, max_size=25)),
    damaged(
        *(pickle.dumps(payload, protocol) for payload in PAYLOADS for protocol in (0, 2, 4)),
        pickle.dumps(refcocog_annotations(3)[0], 2),
    ),
)


# ---- targets


def plain_pickle(data: bytes) -> None:
    file = FOLDER / "refs.p"
    file.write_bytes(data)
    value = harmless(lambda: load_plain_pickle(file))
    seen, left = set(), [value]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            left += one
        else:
            plain = one is None or type(one) in (bool, int, float, str, bytes, bytearray)
            assert plain, type(one)


def _ready(name: str, file: str) -> Callable[[bytes], None]:
    """A target that opens a benchmark with this annotation file and its first items."""

    def target(data: bytes) -> None:
        path = FOLDER / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        dataset = harmless(lambda: get_dataset(name, FOLDER, data_dir=FOLDER))
        for index in range(0 if dataset is None else min(len(dataset), 3)):
            item = harmless(lambda index=index: dataset.item(index))
            if item is not None:
                assert item.id and all(isinstance(text, str) and text for text in item.texts), item
            harmless(lambda index=index: dataset[index])  # the pictures are not there

    return target


REFERENCES = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": LEAVES,
            "split": st.sampled_from(["val", "train"]),
            "sentences": st.lists(st.fixed_dictionaries({"sent": LEAVES, "sent_id": LEAVES}), max_size=3) | LEAVES,
        }
    ),
    max_size=4,
).map(pickle.dumps)


@cache
def golden_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(GOLDEN / "tiny-sd", subfolder="unet", local_files_only=True)


def checkpoint_seeds() -> list[bytes]:
    """Small checkpoints in the three forms there are, for one projection."""
    layer, (out_features, in_features) = next(iter(expected_shapes(golden_unet()).items()))
    module, projection = layer.rsplit(".", 1)
    down, up = torch.ones(2, in_features), torch.ones(out_features, 2)
    old = {f"{module}.processor.{projection}_lora.{m}.weight": t for m, t in (("down", down), ("up", up))}
    new = {f"unet.{layer}.lora_{m}.weight": t for m, t in (("A", down), ("B", up))}
    metadata = [json.dumps(m) for m in ({"unet.lora_alpha": 8, "unet.r": 4}, {"unet.lora_alpha": "8", "unet.r": 0}, [])]
    seeds = [save(new, metadata={"lora_adapter_metadata": text}) for text in metadata]
    objects = [old, {"a": PAYLOADS[0]}, {"a": 1}, [old], {**old, "b": torch.eye(2).to_sparse()}]
    for value in objects:
        for zipped in (True, False):
            torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
            seeds.append(buffer.getvalue())
    return [*seeds, (GOLDEN / "lora-legacy" / "pytorch_model.bin").read_bytes()]


SETTINGS = st.one_of(
    damaged(b'{"halves": "both", "attention_weight": 0.5, "untuned_denoising": true}', b"[" * 100_000),
    st.fixed_dictionaries({}, optional={"halves": LEAVES, "attention_weight": LEAVES, "untuned_denoising": LEAVES})
    .filter(lambda value: not any(isinstance(one, bytes) or one == 10**5000 for one in value.values()))
    .map(lambda value: json.dumps(value).encode()),
    st.just(b'{"attention_weight": 1' + b"0" * 400 + b"}"),
)


def _checkpoint(data: bytes, settings: bytes) -> None:
    for name in ("pytorch_model.bin", "pytorch_lora_weights.safetensors"):
        file = FOLDER / "checkpoint" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        (file.parent / "dsd_settings.json").write_bytes(settings)
        prompts = harmless(lambda file=file: read_attention_prompts(file))
        if prompts is None:
            continue
        assert all(tensor.dtype == torch.float32 for tensor in prompts.state_dict.values())
        assert prompts.halves in ("both", "cond") and isinstance(prompts.untuned_denoising, bool)
        assert 0 <= prompts.attention_weight < float("inf")
        harmless(lambda prompts=prompts: check_prompts_fit(prompts, golden_unet(), "the model"))


def checkpoint(data: tuple[bytes, bytes]) -> None:
    _checkpoint(*data)


def image_seeds() -> list[bytes]:
    """A small picture in many formats and modes, PostScript among them, which Pillow reads with another program."""
    seeds = []
    picture = Image.effect_mandelbrot((16, 12), (-2, -1, 1, 1), 9)
    for mode, formats in {
        "RGB": ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "EPS", "PCX", "TGA", "ICO", "JPEG2000"],
        "L": ["PNG", "TIFF"], "P": ["GIF", "PNG"], "CMYK": ["JPEG", "TIFF"], "RGBA": ["PNG", "WEBP"], "I;16": ["PNG"],
    }.items():  # fmt: skip
        for name in formats:
            exif = Image.Exif()
            exif[0x0112] = 6
            options = {"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}
            picture.convert(mode).save(buffer := io.BytesIO(), name, **options)
            seeds.append(buffer.getvalue())
    frames = [picture.convert("P"), picture.rotate(90).convert("P")]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    return [*seeds, buffer.getvalue()]


def image(data: bytes) -> None:
    file = FOLDER / "picture.jpg"
    file.write_bytes(data)
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1_000_000  # larger ones are only slower
    try:
        picture = harmless(lambda: open_image(file))
    finally:
        Image.MAX_IMAGE_PIXELS = most
    if picture is not None:
        assert picture.mode == "RGB" and 0 not in picture.size
        tensor = to_tensor(picture, 8)
        assert tensor.shape == (3, 8, 8) and tensor.abs().max() <= 1


def _csv(rows: Any) -> bytes:
    return rows.to_csv(index=False).encode()


LONG = "9" * 5000  # more digits than Python turns into a number
TABLE = _csv(comvg_rows(2)) + f"a,b,c,{LONG},1,verb\n".encode()
QUESTIONS = _csv(vqa_rows(2)) + f"a,{LONG}{',b' * 9}\n".encode()
EXAMPLES = "\n".join(json.dumps(example) for example in winoground_examples(2)).encode()
LONG_NAME = json.dumps(winoground_examples(1)[0] | {"image_0": "a" * 5000}).encode()

# by name: the content, and what is done with it
TARGETS: dict[str, tuple[st.SearchStrategy, Callable[[Any], None]]] = {
    "pickle": (PICKLES, plain_pickle),
    "references": (st.one_of(REFERENCES, PICKLES), _ready("Refcocog", "refcocog/refs(google).p")),
    "comvg": (damaged(TABLE, TABLE.replace(LONG.encode(), b"1")), _ready("ComVG", "compositional_visual_genome.csv")),
    "vqa": (damaged(QUESTIONS, _csv(vqa_rows(3))), _ready("vqa_other", "vqa_text_test.csv")),
    "test.txt": (damaged("\n".join(binary_lines(40)).encode()), _ready("vqa_binary", "test.txt")),
    "winoground": (damaged(EXAMPLES, LONG_NAME, b"[" * 100_000), _ready("winoground", "winoground/examples.jsonl")),
    "checkpoint": (st.tuples(st.deferred(lambda: damaged(*checkpoint_seeds())), SETTINGS), checkpoint),
    "image": (damaged(*image_seeds()), image),
}
