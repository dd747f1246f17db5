"""Pictures of the drawn world of `diffusers_dsd.shapes`: where things stand and how they look.

All geometry is in unit coordinates (x to the right, y down, the picture is the unit square) and is drawn from
the generator before anything that depends on the size, so one seed gives the same composition at every size
and in every look.
"""

import colorsys
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from diffusers_dsd.errors import DSDError

if TYPE_CHECKING:
    from diffusers_dsd.shapes import Scene

LOOKS = ("plain", "shift")

# How far "shift" is from what shapes-sd was trained on: 0 is only outlines, 1 is strong clutter and noise.
# Tuned so that the untuned denoising score of shapes-sd lies well between chance and perfect.
SHIFT_STRENGTH = 0.4

PALETTE = {
    "red": (214, 36, 36),
    "orange": (250, 138, 22),
    "yellow": (250, 226, 48),
    "green": (42, 158, 62),
    "cyan": (52, 206, 214),
    "blue": (36, 70, 218),
    "purple": (122, 40, 170),
    "pink": (250, 128, 190),
}


def _star(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    radii = [outer if i % 2 == 0 else inner for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


_EXTENT = 1.12  # no outline reaches further from its centre, so this is what keeps things apart and inside
_ARM = 0.36  # half the width of a cross's arm
OUTLINES = {  # corners around the centre (0, 0), for a radius of 1; areas are roughly alike
    "circle": _star(24, 0.95, 0.95),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (1.0, 0.78), (-1.0, 0.78)],
    "diamond": [(0.0, -1.12), (0.85, 0.0), (0.0, 1.12), (-0.85, 0.0)],
    "cross": [
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ],
    "star": _star(5, 1.12, 0.46),
}  # fmt: skip

_RADII = (0.14, 0.19)  # of a thing, in picture widths
_MARGIN = 0.02  # kept free at the border and between two things
_LEAN = 0.35  # the other axis differs by at most this share of the separation, so the relation stays clear
_CONTRAST = 100  # least RGB distance (of 441) between the background and each thing

RandomSource = random.Random | np.random.Generator


@dataclass(frozen=True)
class Drawing:
    """One picture of a scene.

    Attributes:
        image: RGB, size × size.
        masks: where the first and the second thing of the scene are: two boolean arrays (size, size), never
            empty, never overlapping. Silhouettes, also where the look draws only outlines.
    """

    image: Image.Image
    masks: tuple[np.ndarray, np.ndarray]


def draw(scene: "Scene", rng: RandomSource, look: str = "plain", size: int = 32) -> Drawing:
    """A picture of `scene`; sizes, positions, exact colours and background come from `rng`.

    Args:
        scene: what to draw.
        rng: a `random.Random` or a numpy `Generator`; it is advanced alike whatever the look and size.
        look: "plain" (filled, on a plain background) or "shift" (faded outlines on a cluttered texture,
            noisy).
        size: width and height in pixels, at least 16. The composition does not depend on it.

    Raises:
        DSDError: an unknown look or a size under 16.
    """
    if look not in LOOKS:
        raise DSDError(f"There is no look {look!r}: choose one of {', '.join(LOOKS)}.")
    if size < 16:
        raise DSDError(f"A size of {size} pixels is too small to tell shapes apart: choose at least 16.")
    radii = (rng.uniform(*_RADII), rng.uniform(*_RADII))
    centres = _place(scene.relation, radii, rng)
    colours = [_jitter(PALETTE[thing.colour], rng) for thing in (scene.first, scene.second)]
    background = _background(colours, rng)
    extras = np.random.default_rng(int(rng.random() * 2**53))  # always drawn, so that looks stay in step

    corners = [
        [(cx + r * x, cy + r * y) for x, y in OUTLINES[thing.shape]]
        for thing, r, (cx, cy) in zip((scene.first, scene.second), radii, centres, strict=True)
    ]
    silhouettes = [_coverage([polygon], size) for polygon in corners]
    canvas = np.broadcast_to(np.asarray(background), (size, size, 3))  # (H, W, 3), 0 … 255
    if look == "plain":
        for coverage, colour in zip(silhouettes, colours, strict=True):
            canvas = _paint(canvas, coverage, colour)
    else:
        canvas = _shifted(canvas, corners, colours, extras, size)
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    # Two things share no point, so at most one of them covers more than half of a pixel.
    return Drawing(image, (silhouettes[0] > 0.5, silhouettes[1] > 0.5))


def _place(relation: str, radii: tuple[float, float], rng: RandomSource) -> list[tuple[float, float]]:
    """Centres of both things: apart along the relation's axis, nearly level on the other."""
    first_leads = relation in ("left of", "above")
    near, far = (_EXTENT * r + _MARGIN for r in (radii if first_leads else radii[::-1]))
    separation = rng.uniform(near + far, 1 - near - far)
    start = rng.uniform(near, 1 - far - separation)
    level = rng.uniform(near, 1 - near)
    lean = rng.uniform(-_LEAN, _LEAN) * separation
    places = [(start, level), (start + separation, min(max(level + lean, far), 1 - far))]
    if relation in ("above", "below"):
        places = [(across, along) for along, across in places]
    return places if first_leads else places[::-1]


def _jitter(colour: tuple[int, int, int], rng: RandomSource) -> tuple[float, ...]:
    return tuple(min(max(channel + rng.uniform(-14, 14), 0), 255) for channel in colour)


def _background(colours: list[tuple[float, ...]], rng: RandomSource) -> tuple[float, ...]:
    """A dark, light or tinted colour that both things stand out from."""
    while True:
        brightness = rng.uniform(0.05, 0.3) if rng.random() < 0.5 else rng.uniform(0.75, 1.0)
        saturation = rng.uniform(0.0, 0.1) if rng.random() < 0.5 else rng.uniform(0.1, 0.35)
        background = tuple(255 * c for c in colorsys.hsv_to_rgb(rng.random(), saturation, brightness))
        if all(math.dist(background, colour) >= _CONTRAST for colour in colours):
            return background


def _coverage(lines: list, size: int, width: float | None = None) -> np.ndarray:
    """How much of each pixel polygons cover, or their outlines of `width` picture widths: (H, W), 0 … 1."""
    # Supersampled: the mean over each pixel's samples is its coverage.
    canvas_size = size * max(2, 128 // size)
    canvas = Image.new("L", (canvas_size, canvas_size))
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        points = [(x * canvas_size - 0.5, y * canvas_size - 0.5) for x, y in line]
        if width is None:
            pen.polygon(points, fill=255)
        else:
            pen.line([*points, *points[:2]], fill=255, width=max(1, round(width * canvas_size)), joint="curve")
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def _paint(canvas: np.ndarray, coverage: np.ndarray, colour: tuple[float, ...]) -> np.ndarray:
    alpha = coverage[..., None]  # (H, W, 1)
    return canvas * (1 - alpha) + np.asarray(colour) * alpha


def _shifted(canvas: np.ndarray, corners: list, colours: list, extras: np.random.Generator, size: int) -> np.ndarray:
    """The look that no training sees: texture, clutter, outlines in faded colours, then sensor noise."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size  # pixel centres, each (H, W)
    angle, frequency, phase = extras.uniform(0, math.pi), extras.uniform(3, 7), extras.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    texture = np.sin(2 * math.pi * frequency * along + phase)
    if extras.random() < 0.5:
        texture = texture * np.sin(2 * math.pi * frequency * across)  # checks instead of stripes
    canvas = canvas + 40 * SHIFT_STRENGTH * texture[..., None]
    ground = canvas.mean(axis=(0, 1))
    for _ in range(4):  # clutter: short grey strokes, as no thing is grey
        centre, turn, length = extras.uniform(0, 1, 2), extras.uniform(0, math.pi), extras.uniform(0.05, 0.2)
        step = np.array([math.cos(turn), math.sin(turn)]) * length
        stroke = _coverage([[tuple(centre - step), tuple(centre + step)]], size, width=0.025)
        canvas = _paint(canvas, stroke * SHIFT_STRENGTH, np.full(3, extras.uniform(0, 255)))
    for polygon, colour in zip(corners, colours, strict=True):
        faded = np.asarray(colour) * (1 - 0.5 * SHIFT_STRENGTH) + ground * 0.5 * SHIFT_STRENGTH
        canvas = _paint(canvas, _coverage([polygon], size, width=0.06), faded)
    return canvas + extras.normal(0, 30 * SHIFT_STRENGTH, canvas.shape)
