"""From picture files and PIL images to what the VAE reads."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from diffusers_dsd.errors import ItemError, first_line

# Not everything that Pillow knows: PostScript, for one, it gives to another program to run, whatever the file's name.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, upright and in RGB (of an animation its first frame).

    Raises:
        ItemError: the file is missing, is a folder, cannot be read as a picture of one of `FORMATS`, or is larger
            than Pillow's limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    path = Path(path)
    if path.is_dir():
        raise ItemError(f"{path} is a folder: give the path of one picture file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return as_rgb(image)
    except FileNotFoundError:
        raise ItemError(f"There is no picture {path}: check the path, or download the file.") from None
    except PermissionError:
        raise ItemError(f"The picture {path} may not be read: change the file's permissions.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ItemError(
            f"The picture {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: use a smaller copy of it."
        ) from None
    except Exception as error:  # Pillow's decoders let almost every type out when a file is damaged
        raise ItemError(
            f"{path} cannot be read as a picture ({first_line(error)}): download it again, or save it as PNG or JPEG."
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` turned upright as its EXIF orientation says, in 8-bit RGB (transparency is dropped).

    Raises:
        ItemError: the image has no pixels.
    """
    if 0 in image.size:
        raise ItemError(f"A picture of {image.width} × {image.height} pixels is empty: give one with pixels.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip, not scale
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    return image.convert("RGB")


def to_tensor(image: Image.Image, resolution: int) -> torch.Tensor:
    """`image` as a float32 tensor (3, resolution, resolution) in [-1, 1]; the aspect ratio is not kept.

    The tensor is contiguous: on CPU a transposed view of the picture would cost the VAE three digits.
    """
    image = as_rgb(image).resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, R, R), 0 … 255
    return pixels.float() / 127.5 - 1


def to_image(image: Image.Image | str | os.PathLike[str] | torch.Tensor, largest: int = 1024) -> Image.Image:
    """A picture to show, upright, in RGB, at most `largest` pixels wide and high.

    Args:
        image: a picture, a path, or a tensor (3, H, W) in [-1, 1].

    Raises:
        ItemError: as `open_image`.
    """
    if isinstance(image, torch.Tensor):
        pixels = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()  # (3, H, W)
        shown = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    else:
        shown = as_rgb(image) if isinstance(image, Image.Image) else open_image(image)
    shown = shown.copy()
    shown.thumbnail((largest, largest), Image.Resampling.BICUBIC)
    return shown
