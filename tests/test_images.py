import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import FORMATS, as_rgb, open_image, to_tensor
from diffusers_dsd.safe_pickle import load_plain_pickle

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def half_red():
    """Red on the left, blue on the right, 40 × 20."""
    image = Image.new("RGB", (40, 20), BLUE)
    image.paste(RED, (0, 0, 20, 20))
    return image


def test_exif_orientation_is_applied_once(tmp_path, half_red):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90° clockwise: left becomes top
    half_red.save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == RED
    assert as_rgb(image).tobytes() == image.tobytes()
    with Image.open(tmp_path / "turned.png") as given:
        assert torch.equal(to_tensor(given, 16), to_tensor(image, 16))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "YCbCr", "L", "LA", "1", "F"])
def test_every_mode_becomes_rgb(half_red, mode):
    converted = as_rgb(half_red.convert(mode))
    assert (converted.mode, converted.size) == ("RGB", half_red.size)
    if mode in ("RGBA", "P", "CMYK", "YCbCr"):
        assert np.abs(np.asarray(converted, dtype=int) - np.asarray(half_red)).max() <= 2


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / name)
    image = np.asarray(open_image(tmp_path / name))
    assert np.array_equal(image[0, :, 0], np.arange(256))
    wide = Image.fromarray(ramp.astype(np.int32))
    assert np.array_equal(np.asarray(as_rgb(wide)), image)


def test_a_gif_gives_its_first_frame(tmp_path, half_red):
    half_red.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (40, 20), (0, 255, 0))])
    assert open_image(str(tmp_path / "a.gif")).getpixel((5, 5)) == RED


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_whatever_the_name(tmp_path, half_red, name):
    half_red.save(tmp_path / "a.jpg", name)
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg"), dtype=int) - np.asarray(half_red))[:, 5].max() <= 40


def test_postscript_is_not_given_to_another_program(tmp_path, half_red, monkeypatch):
    def start(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", start)
    half_red.save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(DSDError, match=r"a\.jpg cannot be read as a picture \(cannot identify"):
        open_image(tmp_path / "a.jpg")


def test_to_tensor_is_a_contiguous_picture_between_minus_one_and_one(half_red):
    tensor = to_tensor(half_red, 32)
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 16, 4].tolist() == [1, -1, -1]
    assert tensor[:, 16, 28].tolist() == [-1, -1, 1]
    resized = np.asarray(half_red.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    assert np.array_equal(tensor.numpy(), resized.transpose(2, 0, 1))


def test_files_that_are_no_pictures_are_named(tmp_path, half_red):
    half_red.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.jpg").mkdir()
    half_red.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    names = ["cut.jpg", "empty.jpg", "text.jpg", "cut.png"]
    expected = dict.fromkeys(names, "cannot be read") | {"folder.jpg": "folder", "no.jpg": "There is no"}
    for name, reason in expected.items():
        with pytest.raises(DSDError, match=reason) as error:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_refused(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(DSDError, match=r"bomb\.png has more than [0-9,]+ pixels"):
        open_image(tmp_path / "bomb.png")


def test_an_unreadable_file_is_named(tmp_path, half_red, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(DSDError, match=r"secret\.png may not be read"):
        open_image(tmp_path / "secret.png")


def test_an_image_without_pixels_is_refused():
    with pytest.raises(DSDError, match="empty"):
        to_tensor(Image.new("RGB", (0, 5)), 32)


# Pickles

PLAIN = [{"image_id": 9, "sent": "a café", "big": 2**70, "box": (1.5, None, True), "ids": {1, 2}}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_come_back(tmp_path, protocol):
    (tmp_path / "refs.p").write_bytes(pickle.dumps(PLAIN, protocol))
    assert load_plain_pickle(tmp_path / "refs.p") == PLAIN


@pytest.mark.parametrize(
    "data, value",
    [
        (
            b"(lp0\n(dp1\nS'sent'\np2\nS'a man'\np3\nsS'id'\nI7\nsa.",
            [{"sent": "a man", "id": 7}],
        ),  # protocol 0
        (b"\x80\x02]q\x01U\x05caf\xc3\xa9a.", ["café"]),  # protocol 2, a byte string of UTF-8
        (b"\x80\x02]q\x01U\x04caf\xe9a.", ["café"]),  # and one of Latin-1
    ],
)
def test_pickles_of_python_2_are_read(tmp_path, data, value):
    (tmp_path / "refs.p").write_bytes(data)
    assert load_plain_pickle(tmp_path / "refs.p") == value


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path, protocol):
    path = tmp_path / "refs.p"
    flag = tmp_path / "run"
    for call in [(os.system, f"touch {flag}"), (eval, f"open('{flag}', 'w')"), (bytearray, 9)]:
        path.write_bytes(pickle.dumps([Payload(*call)], protocol))
        with pytest.raises(DSDError, match=rf"would run code \(.*{call[0].__name__}\)") as error:
            load_plain_pickle(path)
        assert str(path) in str(error.value)
    assert not flag.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<!DOCTYPE html>",
        pickle.dumps(PLAIN)[:-9],
        b"\x80\x02P1\n.",  # a persistent id
        b"\x80\x02\x82\x07.",  # an extension code
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of a length that no memory holds
        b"(" * 100_000 + b".",
        b"cbuiltins\nset\n(I5\ntR.",  # set(5)
    ],
)
def test_damaged_pickles_are_named(tmp_path, data):
    (tmp_path / "refs.p").write_bytes(data)
    with pytest.raises(DSDError, match=r"refs\.p is not a whole pickle"):
        load_plain_pickle(tmp_path / "refs.p")


def pairs(depth):
    """Tuples that hold the one before twice."""
    value = 5
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_tuples_come_back(tmp_path, protocol):
    value = [pairs(5), {pairs(5): 1, (1, (2, "a")): [3]}, {(1, 2), (3,)}, [(i, str(i)) for i in range(2000)]]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
    assert load_plain_pickle(tmp_path / "refs.p") == value


@pytest.mark.parametrize(
    "key", [pickle.dumps(pairs(60), 2)[2:-1], b")" + b"\x85" * 150_000, b")" + b"2\x86" * 60], ids=len
)
def test_tuples_that_would_be_hashed_for_ever_are_refused(tmp_path, key):
    (tmp_path / "refs.p").write_bytes(b"\x80\x02}" + key + b"K\x01s.")
    with pytest.raises(DSDError, match=r"refs\.p is not a whole pickle file"):
        load_plain_pickle(tmp_path / "refs.p")


def test_deep_nesting_does_no_harm(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert len(load_plain_pickle(tmp_path / "refs.p")) == 1


def test_a_missing_pickle_is_named(tmp_path):
    with pytest.raises(DSDError, match=r"refs\.p cannot be read \(No such file"):
        load_plain_pickle(tmp_path / "refs.p")
