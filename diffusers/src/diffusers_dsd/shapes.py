"""A drawn world of two coloured shapes and how they stand to each other: sentences, pictures, questions.

A scene is "a red circle left of a blue square"; "a blue square right of a red circle" is the same scene
worded from its other side. About a fifth of the pairs of things is held out, in every relation and both
wordings, so a model trained on the split "train" has never met a test scene. Everything comes from seeds; no
files are needed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeVar

import numpy as np
from PIL import Image

from diffusers_dsd.errors import DSDError
from diffusers_dsd.shapes_drawing import LOOKS, OUTLINES, PALETTE, Drawing, RandomSource, draw

__all__ = [
    "COLOURS", "KINDS", "LOOKS", "RELATIONS", "SHAPES", "SPLITS", "THINGS", "WORDS",
    "Drawing", "RandomSource", "Scene", "ShapesItem", "Thing", "all_scenes", "draw", "shapes_item",
]  # fmt: skip

COLOURS = tuple(PALETTE)
SHAPES = tuple(OUTLINES)
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("sub", "obj", "verb", "text")
SPLITS = ("train", "test")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_TEST_SHARE = 0.2  # of the unordered pairs of things
_T = TypeVar("_T")


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DSDError(f"There is no {name} {value!r} in Shapes: choose one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class Thing:
    """A shape in a colour: one of `SHAPES` in one of `COLOURS`; a `DSDError` otherwise."""

    colour: str
    shape: str

    def __post_init__(self) -> None:
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
WORDS = tuple(sorted({"a", "an", *COLOURS, *SHAPES, *(word for relation in RELATIONS for word in relation.split())}))


@dataclass(frozen=True)
class Scene:
    """Two different things and how the first stands to the second, in one of the two possible wordings.

    Raises:
        DSDError: both things are the same, or the relation is not one of `RELATIONS`.
    """

    first: Thing
    relation: str
    second: Thing

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise DSDError(f"There is no relation {self.relation!r}: choose one of {', '.join(RELATIONS)}.")
        if self.first == self.second:
            raise DSDError(f"A scene needs two different things, not {self.first} twice.")

    @property
    def sentence(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    @property
    def mirrored(self) -> "Scene":
        """The same scene worded from the other side: "B right of A" for "A left of B"."""
        return Scene(self.second, _OPPOSITE[self.relation], self.first)

    @property
    def opposite(self) -> "Scene":
        """The other scene in which the two things have changed places."""
        return Scene(self.first, _OPPOSITE[self.relation], self.second)

    @property
    def turned(self) -> tuple["Scene", "Scene"]:
        """The two scenes of the same things along the other axis."""
        across = ("above", "below") if self.relation in ("left of", "right of") else ("left of", "right of")
        return Scene(self.first, across[0], self.second), Scene(self.first, across[1], self.second)

    @property
    def canonical(self) -> "Scene":
        """The wording that starts with the left or upper thing: equal for both wordings of a scene."""
        return self if self.relation in ("left of", "above") else self.mirrored

    @property
    def split(self) -> str:
        """ "train" or "test", the same for all scenes of these two things (and in every process)."""
        pair = " and ".join(sorted((str(self.first), str(self.second))))
        digest = hashlib.sha256(pair.encode()).digest()
        return "test" if int.from_bytes(digest[:8]) < _TEST_SHARE * 2**64 else "train"


def all_scenes(split: str) -> list[Scene]:
    """Every scene of a split once, in its canonical wording (`.mirrored` is the other), in a fixed order.

    Raises:
        DSDError: the split is not one of `SPLITS`.
    """
    _check("split", split, SPLITS)
    scenes = []
    for one, other in combinations(THINGS, 2):
        if Scene(one, "above", other).split == split:
            for relation in ("left of", "above"):
                scenes += [Scene(one, relation, other), Scene(other, relation, one)]
    return scenes


@dataclass(frozen=True)
class ShapesItem:
    """One question: which of the images fits the text, or which of the texts fits the image.

    Attributes:
        id: names kind, split, seed and index.
        texts: 1 sentence (kinds sub, obj, verb) or 10 (kind text).
        images: 2 pictures, or 1 for kind text.
        scenes: the scene of each candidate: of each image, or of each text for kind text.
        drawings: the pictures with their masks, parallel to `images`.
        label: index of the right candidate.
        tags: "kind", "look" and, but for kind text, "change": "colour", "shape" or "both" for sub and obj,
            "opposite" or "axis" for verb.
    """

    id: str
    texts: list[str]
    images: list[Image.Image]
    scenes: list[Scene]
    drawings: list[Drawing]
    label: int
    tags: dict[str, str] = field(default_factory=dict)


def shapes_item(
    kind: str, index: int, seed: int = 0, split: str = "test", look: str = "plain", size: int = 32
) -> ShapesItem:
    """Question number `index` of an endless list; it depends on its arguments alone.

    The look and the size change the pictures, never the question, the layout or the right answer's position.

    Args:
        kind: "sub", "obj" or "verb": 1 sentence and 2 images, the wrong one with another first thing,
            second thing or relation, both drawn afresh; "text": 1 image, its sentence and 9 wrong ones, in
            mixed wordings and none of the same scene.
        index: 0 or more. It also sets the change: colour, shape, both in turn for sub and obj; opposite,
            axis in turn for verb.
        seed: 0 or more; another seed is another list.
        split: "train" or "test": the right and every wrong scene is of this split.
        look: "plain" or "shift".
        size: width and height of the images in pixels, at least 16.

    Raises:
        DSDError: an argument outside its range.
    """
    _check("kind", kind, KINDS)
    _check("split", split, SPLITS)
    _check("look", look, LOOKS)
    if index < 0 or seed < 0:
        raise DSDError(f"Index and seed of a Shapes item are 0 or more, not {index} and {seed}.")
    # A numpy seed sequence gives the same stream in every process and on every machine.
    rng = np.random.default_rng([KINDS.index(kind), SPLITS.index(split), seed, index])
    if kind == "text":
        right, wrong, change = *_text_scenes(rng, split), None
    else:
        change = ("opposite", "axis")[index % 2] if kind == "verb" else ("colour", "shape", "both")[index % 3]
        right, one_wrong = _image_scenes(kind, change, rng, split)
        wrong = [one_wrong]
    label = int(rng.integers(len(wrong) + 1))
    scenes = [*wrong[:label], right, *wrong[label:]]
    drawings = [draw(scene, rng, look, size) for scene in ([right] if kind == "text" else scenes)]
    return ShapesItem(
        id=f"{kind}-{split}-{seed}-{index}",
        texts=[scene.sentence for scene in scenes] if kind == "text" else [right.sentence],
        images=[drawing.image for drawing in drawings],
        scenes=scenes,
        drawings=drawings,
        label=label,
        tags={"kind": kind, "look": look} | ({"change": change} if change else {}),
    )


def _image_scenes(kind: str, change: str, rng: np.random.Generator, split: str) -> tuple[Scene, Scene]:
    """A right scene and one that differs from it by `change` in the part that `kind` names."""
    while True:  # a scene may have no neighbour of its split: then take another
        right = _random_scene(rng, split)
        if kind == "verb":
            choices = [right.opposite] if change == "opposite" else list(right.turned)
        else:
            differs = {
                "colour": lambda old, new: new.shape == old.shape,
                "shape": lambda old, new: new.colour == old.colour,
                "both": lambda old, new: new.shape != old.shape and new.colour != old.colour,
            }[change]
            choices = _swapped(right, kind, differs)
        if choices:
            return right, _pick(choices, rng)


def _text_scenes(rng: np.random.Generator, split: str) -> tuple[Scene, list[Scene]]:
    """A right scene and 9 others: 3 with another first thing, 3 another second, the 3 other relations."""
    while True:
        right = _random_scene(rng, split)
        firsts, seconds = (_swapped(right, part, lambda old, new: True) for part in ("sub", "obj"))
        if len(firsts) >= 3 and len(seconds) >= 3:
            break
    wrong = [right.opposite, *right.turned]
    for choices in (firsts, seconds):
        wrong += [choices[i] for i in rng.choice(len(choices), 3, replace=False)]
    wrong = [wrong[i] for i in rng.permutation(len(wrong))]
    # Mixed wordings, so that the answer cannot be told from how a sentence starts.
    return right, [scene.mirrored if rng.random() < 0.5 else scene for scene in wrong]


def _random_scene(rng: np.random.Generator, split: str) -> Scene:
    while True:
        one, other = rng.choice(len(THINGS), 2, replace=False)
        scene = Scene(THINGS[one], _pick(RELATIONS, rng), THINGS[other])
        if scene.split == split:
            return scene


def _swapped(scene: Scene, part: str, differs: Callable[[Thing, Thing], bool]) -> list[Scene]:
    """All scenes of its split with another first ("sub") or second ("obj") thing that `differs` allows."""
    old, kept = (scene.first, scene.second) if part == "sub" else (scene.second, scene.first)
    things = [new for new in THINGS if new not in (old, kept) and differs(old, new)]
    scenes = [Scene(new, scene.relation, kept) if part == "sub" else Scene(kept, scene.relation, new) for new in things]
    return [other for other in scenes if other.split == scene.split]


def _pick(choices: Sequence[_T], rng: np.random.Generator) -> _T:
    return choices[int(rng.integers(len(choices)))]
