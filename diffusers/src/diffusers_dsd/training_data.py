"""What a training learns from: the questions that an item asks, and parts of a benchmark."""

from diffusers_dsd.item_records import Benchmark, Item
from diffusers_dsd.training import Example


class Part:
    """Some items of a benchmark."""

    def __init__(self, whole: Benchmark, indices: range) -> None:
        self.whole, self.indices = whole, indices
        self.name, self.metrics = whole.name, whole.metrics

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.whole[self.indices[index]]


def examples_of(item: Item) -> list[Example]:
    """The questions an item asks: which image fits its text, which text its image, or both for each of n pairs."""
    images, texts = range(len(item.images)), range(len(item.texts))
    if item.label is not None:
        candidates = [(image, text, 0) for image in images for text in texts]
        return [Example(candidates, item.label)]
    examples = []
    for i in images:  # text i belongs to image i: its rivals are in the same row and the same column
        rivals = [(i, j, 0) for j in texts if j != i] + [(j, i, 0) for j in images if j != i]
        examples.append(Example([(i, i, 0), *rivals], 0))
    return examples
