"""Which tokens of a CLIP prompt belong to which word."""

import re
from collections.abc import Callable, Sequence

_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")  # "dog's", "well-known"; a run of punctuation is a word of its own


def words_with_tokens(
    text: str, tokenize: Callable[[str], Sequence[int]], max_tokens: int
) -> list[tuple[str, list[int]]]:
    """The words of a text in order, each with the places of its tokens in the prompt (the first token is at 1).

    Args:
        text: the prompt.
        tokenize: gives the ids of a text's tokens, without special ones.
        max_tokens: places in the prompt, the start and end token included; what lies behind is cut off, and words
            that lose all their tokens are left out.
    """
    words = _WORD.findall(text)
    tokens = [list(tokenize(word)) for word in words]
    if [token for ids in tokens for token in ids] != list(tokenize(text)):
        # The tokenizer cuts this text elsewhere than between words and punctuation, but always at spaces.
        words = text.split()
        tokens = [list(tokenize(word)) for word in words]
    result, start = [], 1
    for word, ids in zip(words, tokens, strict=True):
        places = [place for place in range(start, start + len(ids)) if place < max_tokens - 1]
        start += len(ids)
        if places:
            result.append((word, places))
    return result
