"""Word maps: tokens to words, the maps against an obvious implementation, and how they show themselves."""

import io
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT
from diffusers_dsd import DSDError, DSDPipeline
from diffusers_dsd.attention import scored_layers
from diffusers_dsd.schedule import shared_noise, timestep_grid
from diffusers_dsd.shapes import shapes_item
from diffusers_dsd.wordmaps import merge_tokens
from diffusers_dsd.words import words_with_tokens
from models import tiny_sdxl, tokenizer


@pytest.fixture(scope="module")
def pipe() -> DSDPipeline:
    pipe = DSDPipeline.from_pretrained(ROOT / "assets" / "shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def item():
    return shapes_item("verb", 0)


def tokens_of(text: str, max_tokens: int = 77) -> list[tuple[str, list[int]]]:
    clip = tokenizer()
    return words_with_tokens(text, lambda part: clip(part, add_special_tokens=False).input_ids, max_tokens)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red circle", ["a", "red", "circle"]),
        ("A dog's well-known ball, isn't it?!", ["A", "dog's", "well-known", "ball", ",", "isn't", "it", "?!"]),
        ("  two\n lines ", ["two", "lines"]),
        ("naïve 42 🐕 כלב", ["naïve", "42", "🐕", "כלב"]),
        ("odd !_foo x", ["odd", "!_foo", "x"]),
        ("", []),
        (" \t", []),
    ],
)
def test_words_hold_all_tokens_of_the_text_once_and_in_order(text, words):
    found = tokens_of(text)
    assert [word for word, _ in found] == words
    places = [place for _, tokens in found for place in tokens]
    assert places == list(range(1, 1 + len(tokenizer()(text, add_special_tokens=False).input_ids)))


def test_each_word_has_the_tokens_that_spell_it():
    clip = tokenizer()
    ids = clip("a dog's unbelievable ball").input_ids
    for word, places in tokens_of("a dog's unbelievable ball"):
        assert clip.decode([ids[place] for place in places]).replace(" ", "") == word


def test_words_behind_the_last_place_are_left_out():
    everything = tokens_of("a red circle left of a blue square")
    kept = tokens_of("a red circle left of a blue square", max_tokens=6)  # 4 between start and end
    assert [place for _, tokens in kept for place in tokens] == [1, 2, 3, 4]
    assert [word for word, _ in kept] == [word for word, tokens in everything if tokens[0] <= 4]


def test_maps_are_the_probabilities_of_the_scored_layers(pipe, item):
    """Against queries and keys taken from the unpatched UNet, one timestep and layer after the other."""
    image, text, words = item.images[0], "a red circle left of a blue square", 8
    maps = pipe.explain(image, text, sampling_steps=5, seed=3, batch_size=2)
    captured = {}
    hooks = [
        pipe.unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: captured.update(
                {name: (module.to_q(args[0]), module.to_k(kwargs["encoder_hidden_states"]), module.heads)}
            ),
            with_kwargs=True,
        )
        for name in scored_layers(pipe.unet)
    ]
    latents, embeds = pipe.encode_images([image]), pipe.encode_texts([text]).embeds[:1]
    total, attention = torch.zeros(words, 8, 8), []
    try:
        for timestep in timestep_grid(5):
            noise = shared_noise(3, timestep, tuple(latents.shape[1:]))[None]
            at = torch.tensor([timestep])
            with torch.no_grad():
                pipe.unet(pipe.denoiser.add_noise(latents, noise, at), at, embeds)
                for query, key, heads in captured.values():
                    logits = torch.stack(
                        [
                            (q @ k.T) / math.sqrt(q.shape[1])
                            for q, k in zip(query[0].chunk(heads, -1), key[0].chunk(heads, -1), strict=True)
                        ]
                    )  # (heads, queries, tokens)
                    attention.append(float(logits.logsumexp(-1).mean()))
                    tokens = logits.softmax(-1).mean(0).T  # (tokens, queries)
                    side = math.isqrt(tokens.shape[1])
                    squares = tokens[1 : 1 + words].view(1, words, side, side)
                    total += torch.nn.functional.interpolate(squares, (8, 8), mode="bilinear")[0]
    finally:
        for hook in hooks:
            hook.remove()
    assert maps.words == text.split()
    torch.testing.assert_close(maps.heatmaps, total / total.sum(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.shares, total.sum((1, 2)) / total.sum(), atol=1e-5, rtol=1e-4)
    assert maps.special_share == pytest.approx(1 - float(total.mean((1, 2)).sum()) / len(attention), abs=1e-5)
    assert maps.attention == pytest.approx(sum(attention) / len(attention), abs=1e-5)


def test_maps_belong_to_the_score(pipe, item):
    seen = []
    maps = pipe.explain(item.images[0], item.texts[0], sampling_steps=5, batch_size=2, on_batch=seen.append)
    assert seen == [2, 2, 1]
    score = pipe.score(item.images[0], item.texts[0], sampling_steps=5, score="attention", halves="cond")
    assert maps.attention == pytest.approx(float(score.scores), abs=1e-5)
    torch.testing.assert_close(maps.heatmaps.sum(0), torch.ones(8, 8))
    assert float(maps.shares.sum()) == pytest.approx(1, abs=1e-6)
    assert 0 < maps.special_share < 1


def test_words_and_phrases_are_found(pipe, item):
    maps = pipe.explain(item.images[0], "a red circle left of a blue square", sampling_steps=2)
    assert len(maps) == 8
    torch.testing.assert_close(maps["A"].heatmap, maps[0].heatmap + maps[5].heatmap)  # both places
    torch.testing.assert_close(maps["red circle"].heatmap, maps[1].heatmap + maps["circle"].heatmap)
    assert maps[-1].word == "square"
    assert [word_map.word for word_map in maps] == maps.words
    with pytest.raises(DSDError, match=r"no 'dog' in .*its words are a, red, circle"):
        maps["dog"]
    with pytest.raises(IndexError):
        maps[8]


def test_the_peak_is_in_the_picture_coordinates_of_the_largest_value(pipe, item):
    maps = pipe.explain(item.images[0], item.texts[0], sampling_steps=2)
    x, y = maps[1].peak
    assert maps[1].heatmap[int(y * 8), int(x * 8)] == maps[1].heatmap.max()


def test_layers_count_alike_whatever_their_size():
    small = torch.tensor([[0.1, 0.6, 0.3]]).expand(4, 3)  # 2 × 2 places; a start token and two words
    large = torch.tensor([[0.5, 0.1, 0.4]]).expand(16, 3)
    maps, shares, special = merge_tokens([small, large], [[1], [2]])
    assert maps.shape == (2, 4, 4)
    torch.testing.assert_close(maps[:, 2, 1], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5]))
    assert special == pytest.approx(0.3)


def test_maps_show_and_save_themselves(pipe, tmp_path):
    picture = Image.new("RGB", (90, 60), "navy")
    maps = pipe.explain(picture, "a red circle $x$", sampling_steps=2)
    assert maps["circle"].overlay().size == (270, 180)  # the picture's shape, not the map's
    for shown in (maps, maps["circle"]):
        assert Image.open(io.BytesIO(shown._repr_png_())).format == "PNG"
    maps.save(tmp_path / "new" / "all.png")
    maps["circle"].save(tmp_path / "circle.png")
    assert Image.open(tmp_path / "new" / "all.png").width > Image.open(tmp_path / "circle.png").width
    with pytest.raises(DSDError, match="cannot be written"):
        maps.save(tmp_path)


def test_the_overlay_is_bright_where_the_map_is_strong(pipe):
    maps = pipe.explain(Image.new("RGB", (64, 64)), "a red circle", sampling_steps=2)
    x, y = maps[2].peak
    overlay = maps[2].overlay().convert("L")
    at_peak = overlay.getpixel((int(x * overlay.width), int(y * overlay.height)))
    assert at_peak > 0.9 * overlay.getextrema()[1]


def test_sdxl_is_explained_too():
    maps = tiny_sdxl().explain(Image.new("RGB", (16, 16)), "two dogs", sampling_steps=2)
    torch.testing.assert_close(maps.heatmaps.sum(0), torch.ones(8, 8))


@pytest.mark.parametrize("text", ["", "  ", None, ["a", "b"]])
def test_a_text_without_words_is_refused(pipe, text):
    with pytest.raises(DSDError, match="give one that has words"):
        pipe.explain(Image.new("RGB", (32, 32)), text)


def test_the_page_of_examples_and_the_pointing_accuracy(tmp_path):
    command = ["assets/word_maps.py", "--limit", "3", "--sampling_time_steps", "1", "--output", tmp_path / "page.png"]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("first shape's word: inside that shape") == 2  # untuned and tuned
    assert Image.open(tmp_path / "page.png").height > 500
