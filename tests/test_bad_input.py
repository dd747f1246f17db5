"""Bad input at every door: each row of the tables is an input, each column a door, each cell what comes of it.

WORKS is a score; anything else is part of the one sentence that names the culprit (in `dsd_infer.py` on the error
stream, with status 1 and without a traceback; elsewhere in a `DSDError`). None: the door has no such input.
"""

import errno
import io
import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from launch import launch, results_of
from PIL import Image
from test_infer import sentence_of
from test_prompts import legacy, random_prompts
from test_results import small_disk

import dsd_infer
from custom_datasets import get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.errors import DSDError
from diffusers_dsd.playground_inputs import open_upload, read_sentences
from diffusers_dsd.playground_model import NO_CHECKPOINT, SharedModel
from models import pipeline_around, tiny_pipeline, tiny_unet
from trees import comvg_rows

WORKS = "a score"
DOORS = ("pipeline", "command line", "playground")
PICTURE = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 9).convert("RGB")


def encoded(picture, name, **options):
    picture.save(buffer := io.BytesIO(), name, **options)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PICTURE, "JPEG", exif=exif)


def cells(table):
    """(input, door, what it is, outcome) of each cell."""
    for name, (value, *outcomes) in table.items():
        outcomes = outcomes * 3 if len(outcomes) == 1 else outcomes
        for door, outcome in zip(DOORS, outcomes, strict=True):
            if outcome is not None:
                yield pytest.param(door, value, outcome, id=f"{name}, {door}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, its folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny):
    pipe = DSDPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def benchmark(tmp_path):
    """One item of Winoground in the layout of the real files."""
    (tmp_path / "winoground" / "images").mkdir(parents=True)
    for name in ("culprit", "other"):
        PICTURE.save(tmp_path / "winoground" / "images" / f"{name}.png")
    example = {"id": 1, "image_0": "culprit", "image_1": "other", "caption_0": "a dog", "caption_1": "a cat"}
    (tmp_path / "winoground" / "examples.jsonl").write_text(json.dumps(example))
    return tmp_path


def change(benchmark, **values):
    file = benchmark / "winoground" / "examples.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def infer(benchmark, tiny, monkeypatch, capsys):
    """dsd_infer.py in this process on the one item: WORKS, or the sentence that it ends in."""

    def run(*args):
        args = ["--val_data", "winoground", "--data_root", benchmark, "--model", tiny, *args]
        args = ["--sampling_steps", "1", "--limit", "1", "--results_dir", benchmark / "out", *args]
        monkeypatch.setattr("sys.argv", ["dsd_infer.py", *map(str, args)])
        try:
            dsd_infer.main()
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code == 1 and said.count("dsd_infer.py: ") == 1 and "Traceback" not in said
            return next(line for line in said.splitlines() if line.startswith("dsd_infer.py: "))
        assert next(iter(results_of(benchmark / "out")["metrics"].values()))["n"] == 1
        return WORKS

    return run


def outcome_of(step):
    """WORKS, or the sentence of a `DSDError`."""
    try:
        step()
    except DSDError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        return str(error)
    return WORKS


def score(pipe, image=PICTURE, text="a dog"):
    assert pipe.score(image, text, sampling_steps=1).scores.isfinite().all()


# ---- pictures

UNREADABLE, A_FOLDER = "unreadable", "folder"
BROKEN = "culprit.png cannot be read as a picture"
MANY = "culprit.png has more than "
PICTURES = {  # content, then the doors
    "truncated JPEG": (encoded(PICTURE, "JPEG")[:-40], BROKEN),
    "empty file": (b"", BROKEN),
    "text renamed": (b"not a picture", BROKEN),
    "PostScript": (encoded(PICTURE, "EPS"), BROKEN),
    "1x1": (encoded(PICTURE.resize((1, 1)), "PNG"), WORKS),
    "20000x20000": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), MANY, MANY, MANY + "25,000,000 pixels"),
    "CMYK": (encoded(PICTURE.convert("CMYK"), "JPEG"), WORKS),
    "palette": (encoded(PICTURE.convert("P"), "PNG"), WORKS),
    "16-bit": (encoded(Image.fromarray(np.arange(96, dtype=np.uint16).reshape(8, 12) * 600), "PNG"), WORKS),
    "alpha": (encoded(PICTURE.convert("RGBA"), "PNG"), WORKS),
    "animated GIF": (encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]), WORKS),
    "EXIF-rotated": (turned(), WORKS),
    "unreadable file": (UNREADABLE, "culprit.png may not be read", "culprit.png may not be read", BROKEN),
    "directory for a file": (A_FOLDER, "culprit.png is a folder", "there is no ", BROKEN),
}


def open_but(denied, real, file, *args, **kwargs):
    if str(file) == str(denied):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))
    return real(file, *args, **kwargs)


@pytest.mark.parametrize(("door", "content", "outcome"), list(cells(PICTURES)))
def test_pictures(door, content, outcome, benchmark, pipe, infer, monkeypatch):
    path = benchmark / "winoground" / "images" / "culprit.png"
    if content == UNREADABLE:
        path.chmod(0)
        if os.access(path, os.R_OK):  # root may read every file: refuse this one as the system would to others
            monkeypatch.setattr("builtins.open", partial(open_but, path, open))
    elif content == A_FOLDER:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    found = {
        "pipeline": lambda: outcome_of(lambda: score(pipe, path)),
        "command line": infer,
        "playground": lambda: outcome_of(lambda: score(pipe, open_upload(str(path))[1])),
    }[door]()
    assert outcome in found and (found == WORKS or "culprit" in found)


# ---- texts

TEXTS = {
    "empty": ("", WORKS, WORKS, "There is no sentence"),
    "10,000 words": ("dog " * 10_000, WORKS, WORKS, "Sentence 1 has 39,999 characters"),
    "emoji": ("a 🐕‍🦺 and a 👩🏽‍🚀", WORKS),
    "right-to-left": ("كلب على \u202eسجادة", WORKS),
    "control characters": ("a\x00dog\x07\x1b[31m\x7f", WORKS),
    "half a surrogate pair": ("a \ud83d dog", "The text 'a \\ud83d dog' holds half of a character"),
    "the same in a long text": ("a \ud83d dog" * 20, "The text 'a \\ud83d dog"),
    "not a string": (5, "A text is 5, of type int", "a name or caption is no text", "The sentences are 5"),
}


@pytest.mark.parametrize(("door", "text", "outcome"), list(cells(TEXTS)))
def test_texts(door, text, outcome, benchmark, pipe, infer):
    change(benchmark, caption_0=text)
    found = {
        "pipeline": lambda: outcome_of(lambda: score(pipe, text=[text])),
        "command line": infer,
        "playground": lambda: outcome_of(lambda: score(pipe, text=read_sentences(text))),
    }[door]()
    assert outcome in found


# ---- tables, which only the command line reads

TABLE = comvg_rows(1).to_csv(index_label="id")
TABLES = {
    "as it should be": (TABLE, WORKS),
    "byte-order mark": ("\ufeff" + TABLE, WORKS),
    "a column is missing": (TABLE.replace("pos_image_id", "image"), "it has no column pos_image_id"),
    "NaN for an id": (TABLE.replace(",180,", ",NaN,"), "its row 1 has 'NaN' as pos_image_id"),
    "wrong encoding": (TABLE.replace("a mat", "a café").encode("latin-1"), "it is not readable as a UTF-8 CSV file"),
    "empty": ("", "it is not readable as a UTF-8 CSV file"),
    "a header and no rows": (TABLE.splitlines()[0], "it has no rows"),
}


@pytest.mark.parametrize(("content", "outcome"), TABLES.values(), ids=TABLES)
def test_tables(content, outcome, benchmark, infer, monkeypatch):
    pictures = benchmark / "Visual_Genome" / "vg_concept"
    pictures.mkdir(parents=True)
    for number in (180, 181):
        PICTURE.save(pictures / f"{number}.jpg")
    file = benchmark / "compositional_visual_genome.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(dsd_infer, "get_dataset", partial(get_dataset, data_dir=benchmark))
    found = infer("--val_data", "ComVG")
    assert outcome in found and (found == WORKS or str(file) in found)


# ---- weights and checkpoints


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def prompts(rank=4, value=None, unet=None):
    tensors = legacy(random_prompts(tiny_unet() if unet is None else unet, rank=rank))
    if value is not None:
        tensors[next(iter(tensors))].fill_(value)
    torch.save(tensors, buffer := io.BytesIO())
    return buffer.getvalue()


CHECKPOINTS = {
    "another rank": (partial(prompts, rank=7), WORKS),
    "another model": (lambda: prompts(unet=tiny_unet(cross_attention_dim=24)), "is a checkpoint of another model"),
    "truncated": (lambda: prompts()[:2000], "pytorch_model.bin"),
    "NaN": (partial(prompts, value=torch.nan), "holds NaN or infinite numbers"),
    "infinity": (partial(prompts, value=torch.inf), "holds NaN or infinite numbers"),
    "code": (lambda: pickle.dumps({"a": Code()}), "pytorch_model.bin is refused"),
}


@pytest.mark.parametrize(("door", "make", "outcome"), list(cells(CHECKPOINTS)))
def test_checkpoints(door, make, outcome, tmp_path, tiny, infer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(make())
    found = {
        "pipeline": lambda: outcome_of(lambda: DSDPipeline.from_pretrained(tiny).load_attention_prompts(tmp_path)),
        "command line": lambda: infer("--output_dir", tmp_path),
        "playground": lambda: outcome_of(lambda: SharedModel(str(tiny), tmp_path, any_model=False)),
    }[door]()
    assert outcome in found and (found == WORKS or "pytorch_model.bin" in found)
    assert not (tmp_path / "executed").exists()


WEIGHTS = {"NaN": (torch.nan, "not a number"), "infinity": (torch.inf, "not a number")}


@pytest.mark.parametrize(("door", "value", "outcome"), list(cells(WEIGHTS)))
def test_weights(door, value, outcome, tmp_path, infer):
    bad = pipeline_around(tiny_unet())
    torch.nn.init.constant_(bad.unet.conv_in.weight, value)
    bad.save_pretrained(tmp_path / "bad")

    def in_the_playground():
        model = SharedModel(str(tmp_path / "bad"), None, any_model=False)
        with model.computing(None, model.model, NO_CHECKPOINT, lambda rows: None) as (loaded, _):
            score(loaded)

    found = {
        "pipeline": lambda: outcome_of(lambda: score(bad)),
        "command line": lambda: infer("--model", tmp_path / "bad"),
        "playground": lambda: outcome_of(in_the_playground),
    }[door]()
    assert outcome in found


# ---- where results go


def test_a_full_disk(benchmark, infer):
    change(benchmark, caption_0="a dog " * 200)
    with small_disk():
        found = infer()
    assert "scores-00000.jsonl cannot be written" in found


@pytest.mark.parametrize("flag", ["--results_dir", "--cache_dir_features"])
@pytest.mark.parametrize("where", ["no folder can be made", "a file for a folder"])
def test_a_folder_that_cannot_be_written(flag, where, benchmark, infer):
    (benchmark / "file").touch()
    folder = "/proc/nowhere" if where == "no folder can be made" else benchmark / "file"
    assert f"{folder}/" in (found := infer(flag, folder)) and "cannot be written" in found


# ---- the script itself, launched


def test_launched(benchmark, tiny):
    culprit = benchmark / "winoground" / "images" / "culprit.png"
    culprit.write_bytes(encoded(PICTURE, "PNG")[:-60])
    args = ["--val_data", "winoground", "--data_root", benchmark, "--model", tiny, "--results_dir", benchmark / "out"]
    assert str(culprit) in sentence_of(launch("dsd_infer.py", *args, "--sampling_steps", "1"))
