"""Word maps: which regions of a picture attended to which word while a score was computed.

In the manner of DAAM (arXiv 2210.04885), but on pictures that exist: the cross-attention probabilities of the scored
layers, averaged over heads and summed over layers and timesteps. The probability of a token is also the derivative of
the attention term A with respect to the token's logits (A is their logsumexp), so a word's part of it is its share of
the score.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from diffusers_dsd.errors import DSDError
from diffusers_dsd.results import write_bytes

_COLOURS = "inferno"
_OPACITY = 0.65  # of the map over the picture
_LEAST_SIZE = 256  # pixels of an overlay's longer side
_ACROSS = 5  # maps in a row of the overview


class _ShowsItself(ABC):
    """Something with a figure, that shows it in a notebook and saves it."""

    @abstractmethod
    def figure(self) -> Figure:
        """What is shown."""

    def save(self, path: str | Path) -> None:
        """Writes the figure as PNG.

        Raises:
            DSDError: the file cannot be written.
        """
        write_bytes(Path(path), self._repr_png_())

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


@dataclass(frozen=True)
class WordMap(_ShowsItself):
    """Where a picture attended to one word (or to several, taken together).

    Attributes:
        word: as it is written in the text.
        heatmap: (h, w) float32, 0 … 1: at each place the word's part of the attention that all words got.
        share: the word's share of the score, 0 … 1, among the words.
        image: the picture.
    """

    word: str
    heatmap: torch.Tensor
    share: float
    image: Image.Image

    @property
    def peak(self) -> tuple[float, float]:
        """Where the word is strongest: x (to the right) and y (down), 0 … 1, of the place's middle."""
        row, column = divmod(int(self.heatmap.argmax()), self.heatmap.shape[1])
        return (column + 0.5) / self.heatmap.shape[1], (row + 0.5) / self.heatmap.shape[0]

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value of the map."""
        return float(self.heatmap.min()), float(self.heatmap.max())

    def overlay(self) -> Image.Image:
        """The map over the picture, dark where it is least, bright where it is most; small pictures are enlarged."""
        scale = max(1, math.ceil(_LEAST_SIZE / max(self.image.size)))
        size = (self.image.width * scale, self.image.height * scale)
        low, high = self.range
        heat = Image.fromarray(((self.heatmap - low) / max(high - low, 1e-12)).numpy())
        heat = np.asarray(heat.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        colours = Image.fromarray((colormaps[_COLOURS](heat)[:, :, :3] * 255).astype(np.uint8))
        return Image.blend(self.image.resize(size, Image.Resampling.BICUBIC), colours, _OPACITY)

    def figure(self) -> Figure:
        """The overlay with its colour bar and what it shows."""
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.imshow(self.overlay())
        axes.set_axis_off()
        axes.set_title(f"“{_plain(self.word)}”, {self.share:.0%} of the score", fontsize=10)
        colours = ScalarMappable(Normalize(*self.range), _COLOURS)
        figure.colorbar(colours, ax=axes, label="part of the words' attention", shrink=0.85)
        return figure


@dataclass(frozen=True)
class WordMaps(_ShowsItself):
    """A map for every word of a text; `maps["dog"]`, `maps["black dog"]` or `maps[2]` is a `WordMap`.

    Attributes:
        image: the picture.
        text: the text.
        words: in order; a word that occurs twice is there twice.
        heatmaps: (words, h, w) float32; they sum to 1 over words at each place.
        shares: (words,) float32, of the score; they sum to 1.
        special_share: the share of the start, end and padding tokens, which is left out of the maps and shares.
        attention: the attention term A of the picture and the text.
    """

    image: Image.Image
    text: str
    words: list[str]
    heatmaps: torch.Tensor
    shares: torch.Tensor
    special_share: float
    attention: float

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[WordMap]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, word: str | int) -> WordMap:
        """The map of a word or phrase, summed over all its places in the text, or of the word at a place.

        Raises:
            DSDError: the text has no such word.
            IndexError: it has no such place.
        """
        if isinstance(word, int):
            places, word = [range(len(self.words))[word]], self.words[word]
        else:
            places = self._places_of(word)
        return WordMap(word, self.heatmaps[places].sum(0), float(self.shares[places].sum()), self.image)

    def _places_of(self, phrase: str) -> list[int]:
        wanted, words = phrase.lower().split(), [word.lower() for word in self.words]
        starts = [i for i in range(len(words)) if wanted and words[i : i + len(wanted)] == wanted]
        if not starts:
            raise DSDError(f"There is no {phrase!r} in {self.text!r}: its words are {', '.join(self.words)}.")
        return sorted({start + i for start in starts for i in range(len(wanted))})

    def figure(self) -> Figure:
        """The picture and an overlay for every word, with its share and the range that its colours stand for."""
        rows = math.ceil((len(self) + 1) / _ACROSS)
        figure = Figure(figsize=(2.1 * _ACROSS, 2.4 * rows + 0.4), layout="constrained")
        figure.suptitle(_plain(self.text), fontsize=11, wrap=True)
        panels = figure.subplots(rows, _ACROSS, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        panels[0, 0].imshow(self.image)
        panels[0, 0].set_title("picture", fontsize=9)
        for axes, word_map in zip(panels.flat[1:], self, strict=False):
            low, high = word_map.range
            axes.imshow(word_map.overlay())
            axes.set_title(f"“{_plain(word_map.word)}” {word_map.share:.0%}\n{low:.2f} … {high:.2f}", fontsize=9)
        bar = figure.colorbar(ScalarMappable(Normalize(), _COLOURS), ax=panels, ticks=[0, 1], shrink=0.85)
        bar.ax.set_yticklabels(["least", "most"])
        figure.supxlabel(
            "Percent: share of the score among the words (of the whole, start, end and padding tokens have "
            f"{self.special_share:.0%}). Range: part of the words' attention at each place.",
            fontsize=8,
        )
        return figure


def merge_tokens(
    layers: Sequence[torch.Tensor], tokens_of_words: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Token probabilities of several layers -> maps and shares of words.

    Args:
        layers: of each scored layer the mean over timesteps, (queries, tokens), queries a square of any size; each
            layer counts alike.
        tokens_of_words: places of each word's tokens.

    Returns:
        Maps (words, h, w), h × w of the finest layer, which sum to 1 over words at each place; shares of the words
        (words,), which sum to 1; and the share of all other tokens in the whole.
    """
    side = max(math.isqrt(len(layer)) for layer in layers)
    total = torch.zeros(len(tokens_of_words), side, side)
    for layer in layers:
        by_word = torch.stack([layer[:, list(tokens)].sum(1) for tokens in tokens_of_words])  # (words, queries)
        square = by_word.float().cpu().unflatten(1, (math.isqrt(len(layer)), -1))  # (words, s, s)
        total += torch.nn.functional.interpolate(square[None], (side, side), mode="bilinear")[0] / len(layers)
    shares = total.mean((1, 2))  # (words,)
    maps = total / total.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    return maps, shares / shares.sum(), float(1 - shares.sum())


def _plain(text: str) -> str:
    """Text for Matplotlib: a dollar sign would start a formula."""
    return text.replace("$", r"\$")
