"""Reads the attention term A of a score out of an unmodified Diffusers UNet (arXiv 2305.10722, section 3.2).

A UNet's cross-attention compares every place of the picture (queries) with every token of the text (keys). How
strongly a place responds to the text as a whole is the logsumexp of its logits; A is its mean over places, heads
and the scored layers.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from diffusers_dsd.errors import DSDError

# "up_blocks.3.attentions.2.transformer_blocks.0.attn2": path, block, attention, transformer block
_CROSS_ATTENTION = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"
)

_FAST = AttnProcessor2_0()  # one for all: compiled blocks are made anew for another
PATHS = ("down", "mid", "up")  # in the order the UNet computes them
_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def check_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """Some of "down", "mid" and "up", in this order.

    Raises:
        DSDError: none, or something else.
    """
    paths = set(paths)
    if not paths or paths - set(PATHS):
        unknown = ", ".join(sorted(paths - set(PATHS))) or "none"
        raise DSDError(f"The scored layers are of {', '.join(PATHS)}: choose some of them (given: {unknown}).")
    return tuple(path for path in PATHS if path in paths)


def scored_layers(unet: UNet2DConditionModel, paths: Iterable[str] = PATHS) -> list[str]:
    """Names of the cross-attention layers that the attention term reads, in the order the UNet computes them.

    Of the down path, the mid block and the up path: every cross-attention in the last block that has any. Where a
    transformer has several blocks (SDXL) only its last one counts. 6 layers in Stable Diffusion 1.5 and 2.1.

    Args:
        unet: the model.
        paths: those of "down", "mid" and "up" whose layers count; the paper takes all.

    Raises:
        DSDError: the UNet has no cross-attention there.
    """
    paths = check_paths(paths)
    found = []  # (path, block, attention, transformer block, name)
    for name in unet.attn_processors:
        if match := _CROSS_ATTENTION.match(name):
            path, block, attention, depth = match.groups()
            found.append((path, int(block or 0), int(attention), int(depth), name.removesuffix(".processor")))
    if not found:
        raise DSDError("This model's UNet has no cross-attention, so it cannot match pictures with text.")
    layers = []
    for path in (_BLOCKS[path] for path in paths):
        last_block = max((layer[1] for layer in found if layer[0] == path), default=None)
        last = {layer[2]: layer for layer in sorted(found) if layer[:2] == (path, last_block)}
        layers += [layer[4] for layer in last.values()]  # the dict kept the deepest block of each transformer
    if not layers:
        raise DSDError(f"This model has no cross-attention in its {' and '.join(paths)} path: choose other --layers.")
    return layers


class AttentionReader:
    """What the scored layers saw in the latest UNet call.

    Args:
        keep_probabilities: keep each scored layer's attention probabilities as well.

    Attributes:
        readings: for each scored layer its reading, (rows,) float32, with gradient where the call had one.
        probabilities: for each scored layer, if they are kept, its attention probabilities averaged over heads,
            (rows, queries, tokens) float32; they sum to 1 over tokens.
    """

    def __init__(self, keep_probabilities: bool = False) -> None:
        self.keep_probabilities = keep_probabilities
        self.readings: dict[str, torch.Tensor] = {}
        self.probabilities: dict[str, torch.Tensor] = {}

    def by_layer(self) -> torch.Tensor:
        """The readings of the latest UNet call, (rows, layers), in the order of `scored_layers`."""
        return torch.stack(list(self.readings.values()), dim=1)

    def mean(self) -> torch.Tensor:
        """A for each row of the latest UNet call, (rows,): every layer counts alike, whatever its size."""
        return self.by_layer().mean(dim=1)


class EverythingRead(Exception):
    """Leaves a UNet call whose scored layers have all been read, where its noise estimate is not needed."""


class ScoredAttnProcessor:
    """Cross-attention that makes its logits once: their logsumexp is the reading, and the output follows from it.

    Args:
        reader: is told the reading.
        name: of the layer.
        is_last: leave the UNet call by `EverythingRead` after this layer's reading.
    """

    def __init__(self, reader: AttentionReader, name: str, is_last: bool = False) -> None:
        self.reader = reader
        self.name = name
        self.is_last = is_last

    @torch.compiler.disable  # what it tells the reader, and where it leaves, no compiled graph could hold
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,  # Diffusers passes it; padding counts, so nothing is ever masked
    ) -> torch.Tensor:
        def split_heads(tensor: torch.Tensor) -> torch.Tensor:  # (rows, n, heads*d) -> (rows, heads, n, d)
            return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = split_heads(attn.to_q(hidden_states))
        key = split_heads(attn.to_k(encoder_hidden_states))
        # float32 whatever the weights are: a logsumexp in float16 is only good to 3 digits
        logits = (query.float() * attn.scale) @ key.float().transpose(-1, -2)  # (rows, heads, queries, tokens)
        logsumexp = logits.logsumexp(dim=-1, keepdim=True)  # (rows, heads, queries, 1)
        self.reader.readings[self.name] = logsumexp.mean(dim=(1, 2, 3))  # (rows,)
        if self.is_last and not self.reader.keep_probabilities:
            raise EverythingRead
        probabilities = (logits - logsumexp).exp()  # (rows, heads, queries, tokens)
        if self.reader.keep_probabilities:
            self.reader.probabilities[self.name] = probabilities.mean(dim=1)  # (rows, queries, tokens)
        if self.is_last:
            raise EverythingRead
        value = split_heads(attn.to_v(encoder_hidden_states))
        output = probabilities.to(value.dtype) @ value  # (rows, heads, queries, d)
        output = output.transpose(1, 2).flatten(2)  # (rows, queries, heads*d)
        return attn.to_out[1](attn.to_out[0](output))


@contextmanager
def read_attention(
    unet: UNet2DConditionModel,
    keep_probabilities: bool = False,
    paths: Iterable[str] = PATHS,
    attention_only: bool = False,
) -> Iterator[AttentionReader]:
    """Patches the UNet's attention while the context lasts and yields what the scored layers read.

    All other layers use `scaled_dot_product_attention`. The previous processors come back when the context is
    left, also through an exception.

    Args:
        unet: the model.
        keep_probabilities: as for `AttentionReader`.
        paths: whose layers are read, see `scored_layers`.
        attention_only: end every UNet call by raising `EverythingRead` once the last of these layers is read.

    Raises:
        DSDError: the UNet has no cross-attention there.
    """
    reader = AttentionReader(keep_probabilities)
    layers = scored_layers(unet, paths)
    previous = dict(unet.attn_processors)
    patched: dict[str, Any] = dict.fromkeys(previous, _FAST)
    for layer in layers:
        is_last = attention_only and layer == layers[-1]
        patched[f"{layer}.processor"] = ScoredAttnProcessor(reader, layer, is_last)
    try:
        unet.set_attn_processor(patched)
        yield reader
    finally:
        unet.set_attn_processor(dict(previous))  # a copy, because it empties what it is given
