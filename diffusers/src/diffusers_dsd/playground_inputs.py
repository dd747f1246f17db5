"""What a stranger may send to the playground: limits, and reading it or saying in one sentence what is wrong."""

from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import open_image

MAX_IMAGES = 16
MAX_SENTENCES = 32
MAX_CHARACTERS = 1000  # of one sentence; a text encoder reads the first 77 tokens
MAX_TIMESTEPS = 200
MAX_SEED = 2**31 - 1
MAX_PIXELS = 25_000_000  # of one picture; checked before it is unpacked
MAX_FILE_SIZE = "20mb"
# Not everything that Pillow knows: for some formats it starts other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def check_images(paths: list[str] | None) -> list[str]:
    """The uploaded files, at least one and not too many.

    Raises:
        DSDError: there is none, or more than `MAX_IMAGES`.
    """
    if not paths:
        raise DSDError("There is no picture: upload one, or click an example.")
    if len(paths) > MAX_IMAGES:
        raise DSDError(f"These are {len(paths)} pictures: give at most {MAX_IMAGES}.")
    return paths


def read_sentences(text: str | None) -> list[str]:
    """The lines that are not blank.

    Raises:
        DSDError: there is none, there are more than `MAX_SENTENCES`, or one is longer than `MAX_CHARACTERS`.
    """
    if not isinstance(text, str | None):
        raise DSDError(f"The sentences are {text!r}: give them as one text, a line each.")
    sentences = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not sentences:
        raise DSDError("There is no sentence: write one, or several in a line each.")
    if len(sentences) > MAX_SENTENCES:
        raise DSDError(f"These are {len(sentences)} sentences: give at most {MAX_SENTENCES}.")
    for number, sentence in enumerate(sentences, 1):
        if len(sentence) > MAX_CHARACTERS:
            raise DSDError(
                f"Sentence {number} has {len(sentence):,} characters: shorten it to at most {MAX_CHARACTERS:,}."
            )
    return sentences


def check_whole_number(name: str, value: Any, least: int, most: int) -> int:
    """A number from a slider or a field.

    Raises:
        DSDError: it is empty, not whole, or outside least … most.
    """
    if not isinstance(value, (int, float)) or value != value // 1 or not least <= value <= most:
        raise DSDError(f"{name} is {value}: give a whole number from {least} to {most:,}.")
    return int(value)


def open_upload(path: str) -> tuple[str, Image.Image]:
    """Name and picture of an uploaded file; the picture is upright and in RGB.

    Raises:
        DSDError: it is no picture, damaged, of a format that is not among `FORMATS`, or has more than `MAX_PIXELS`.
    """
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads no further than the size
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = MAX_PIXELS  # too many in any case
    except Exception as error:  # Pillow's readers let almost every type out when a file is damaged
        raise DSDError(f"{name} cannot be read as a picture: give a PNG, JPEG, WebP, GIF, BMP or TIFF.") from error
    if width * height > MAX_PIXELS:
        raise DSDError(f"{name} has more than {MAX_PIXELS:,} pixels: use a smaller copy of it.")
    try:
        return name, open_image(path)
    except DSDError as error:
        # where the server keeps uploads is nobody's business
        raise DSDError(str(error).replace(str(path), name)) from error
