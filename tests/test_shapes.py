"""The drawn world, and the bundled model trained on it."""

import hashlib
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_dsd.errors import DSDError
from diffusers_dsd.schedule import shared_noise, timestep_grid
from diffusers_dsd.shapes import (
    COLOURS,
    KINDS,
    LOOKS,
    RELATIONS,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    all_scenes,
    draw,
    shapes_item,
)

MODEL = Path(__file__).parents[1] / "assets" / "shapes-sd"
SCENE = Scene(Thing("red", "circle"), "left of", Thing("orange", "square"))


# ---------------------------------------------------------------- scenes


def test_world_is_large_enough():
    assert len(COLOURS) >= 8 and len(SHAPES) >= 6 and len(RELATIONS) >= 4


def test_sentence_and_other_wordings():
    assert SCENE.sentence == "a red circle left of an orange square"
    assert SCENE.mirrored.sentence == "an orange square right of a red circle"
    assert SCENE.opposite.sentence == "a red circle right of an orange square"
    assert [scene.relation for scene in SCENE.turned] == ["above", "below"]
    assert SCENE.mirrored.mirrored == SCENE
    assert SCENE.mirrored.canonical == SCENE.canonical == SCENE
    assert set(WORDS) == {word for split in ("train", "test") for s in _wordings(split) for word in s.split()}


def _wordings(split):
    return {text for scene in all_scenes(split) for text in (scene.sentence, scene.mirrored.sentence)}


def test_test_scenes_are_held_out_in_every_wording():
    train, test = _wordings("train"), _wordings("test")
    assert not train & test
    things = len(COLOURS) * len(SHAPES)
    assert len(train) + len(test) == things * (things - 1) * len(RELATIONS)  # together: everything
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3
    for split in ("train", "test"):
        for scene in random.Random(0).sample(all_scenes(split), 200):
            family = [scene, scene.mirrored, scene.opposite, *scene.turned]
            assert {member.split for member in family} == {split}
    # Every word is learned: each thing is met in training.
    assert {scene.first for scene in all_scenes("train")} == {scene.first for scene in all_scenes("test")}


# ---------------------------------------------------------------- items


def test_items_are_the_same_on_every_machine():
    items = [shapes_item(kind, index) for kind in KINDS for index in range(20)]
    told = "\n".join(f"{item.id} {item.texts} {item.label} {[s.sentence for s in item.scenes]}" for item in items)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "2bb888315b7b3c99"
    # Pictures too, up to the last bit of floating-point arithmetic.
    means = [np.asarray(shapes_item("sub", index).images[0]).mean() for index in range(3)]
    assert means == pytest.approx([30.46, 186.40, 160.52], abs=0.05)


def test_item_depends_on_its_arguments_alone():
    one = shapes_item("sub", 5)
    shapes_item("sub", 4)
    again = shapes_item("sub", 5)
    assert one.texts == again.texts and one.label == again.label and one.id == again.id
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in again.images]
    for other in (shapes_item("sub", 5, seed=1), shapes_item("sub", 5, split="train"), shapes_item("sub", 6)):
        assert other.id != one.id and other.scenes != one.scenes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_candidates(kind, split):
    items = [shapes_item(kind, index, split=split) for index in range(150)]
    for item in items:
        n_images, n_texts = (1, 10) if kind == "text" else (2, 1)
        assert (len(item.images), len(item.drawings), len(item.texts)) == (n_images, n_images, n_texts)
        assert len(item.scenes) == n_images * n_texts
        assert {scene.split for scene in item.scenes} == {split}
        # No wrong candidate says the same as the right one in other words.
        assert len({scene.canonical for scene in item.scenes}) == len(item.scenes)
        right = item.scenes[item.label]
        assert item.texts[item.label if kind == "text" else 0] == right.sentence
        if kind == "text":
            assert item.texts == [scene.sentence for scene in item.scenes]
    # The right answer's place says nothing: each place within 4 standard deviations of its share.
    places = len(items[0].scenes)
    counts = np.bincount([item.label for item in items], minlength=places)
    share = 1 / places
    assert np.all(np.abs(counts - 150 * share) < 4 * math.sqrt(150 * share * (1 - share)))


def test_wrong_candidate_differs_only_where_the_tags_say():
    for index in range(60):
        for kind in ("sub", "obj", "verb"):
            item = shapes_item(kind, index)
            assert item.tags["kind"] == kind and item.tags["look"] == "plain"
            right, wrong = item.scenes[item.label], item.scenes[1 - item.label]
            if kind == "verb":
                assert (right.first, right.second) == (wrong.first, wrong.second)
                assert (item.tags["change"] == "opposite") == (wrong == right.opposite)
                continue
            old, new, kept = (right.first, wrong.first, (right.second, wrong.second))
            if kind == "obj":
                old, new, kept = (right.second, wrong.second, (right.first, wrong.first))
            assert kept[0] == kept[1] and right.relation == wrong.relation
            changed = {(True, False): "colour", (False, True): "shape", (True, True): "both"}
            assert item.tags["change"] == changed[old.colour != new.colour, old.shape != new.shape]
    assert "change" not in shapes_item("text", 0).tags
    for kind in ("sub", "obj"):
        assert [shapes_item(kind, i).tags["change"] for i in range(3)] == ["colour", "shape", "both"]
    assert [shapes_item("verb", i).tags["change"] for i in range(2)] == ["opposite", "axis"]


# ---------------------------------------------------------------- pictures


def test_masks_say_where_the_things_are():
    rng = random.Random(1)
    for scene in rng.sample(all_scenes("test"), 100):
        drawing = draw(scene, rng, size=48)
        first, second = drawing.masks
        assert drawing.image.size == (48, 48) and drawing.image.mode == "RGB"
        assert first.shape == second.shape == (48, 48) and first.any() and second.any()
        assert not (first & second).any()
        for edge in (first | second)[[0, -1]], (first | second)[:, [0, -1]]:
            assert not edge.any()  # nothing is cut off
        (y1, x1), (y2, x2) = (np.argwhere(mask).mean(0) for mask in (first, second))
        held = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
        assert held[scene.relation]
        along, across = abs(x1 - x2), abs(y1 - y2)
        if scene.relation in ("above", "below"):
            along, across = across, along
        assert along > 2 * across  # the relation is never ambiguous
        pixels = np.asarray(drawing.image, dtype=float)
        ground = np.median(pixels[~(first | second)], axis=0)
        for mask in (first, second):
            assert np.linalg.norm(pixels[mask].mean(0) - ground) > 60  # it stands out


def test_looks_and_sizes_keep_the_question_and_the_layout():
    for index in range(10):
        plain = shapes_item("sub", index)
        shift = shapes_item("sub", index, look="shift")
        large = shapes_item("sub", index, size=64)
        assert shift.tags == plain.tags | {"look": "shift"}
        for other in (shift, large):
            assert other.texts == plain.texts and other.label == plain.label and other.scenes == plain.scenes
        for one, two, big in zip(plain.drawings, shift.drawings, large.drawings, strict=True):
            assert one.image.tobytes() != two.image.tobytes()
            assert all(np.array_equal(a, b) for a, b in zip(one.masks, two.masks, strict=True))
            for mask, double in zip(one.masks, big.masks, strict=True):
                centres = np.argwhere(mask).mean(0), (np.argwhere(double).mean(0) - 0.5) / 2
                assert np.abs(centres[0] - centres[1]).max() < 0.5  # of a pixel of the small one


def test_both_random_sources_draw():
    for look in LOOKS:
        for rng in (random.Random(0), np.random.default_rng(0)):
            assert draw(SCENE, rng, look).image.size == (32, 32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: shapes_item("subject", 0), "'subject'"),
        (lambda: shapes_item("sub", -1), "-1"),
        (lambda: shapes_item("sub", 0, seed=-1), "-1"),
        (lambda: shapes_item("sub", 0, split="val"), "'val'"),
        (lambda: shapes_item("sub", 0, look="noisy"), "'noisy'"),
        (lambda: shapes_item("sub", 0, size=8), "8 pixels"),
        (lambda: draw(SCENE, random.Random(0), "noisy"), "'noisy'"),
        (lambda: all_scenes("all"), "'all'"),
        (lambda: Thing("mauve", "circle"), "'mauve'"),
        (lambda: Thing("red", "blob"), "'blob'"),
        (lambda: Scene(SCENE.first, "beside", SCENE.second), "'beside'"),
        (lambda: Scene(SCENE.first, "above", SCENE.first), "twice"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, words):
    with pytest.raises(DSDError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- shapes-sd


@pytest.fixture(scope="module")
def pipe():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a model this small, more threads are slower, beside another program much slower
    yield StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    torch.set_num_threads(threads)


def test_model_folder_is_small_and_safe():
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6
    weights = [file for file in files if file.suffix not in (".json", ".txt", ".md")]
    assert {file.suffix for file in weights} == {".safetensors"} and len(weights) == 3


def test_model_is_a_standard_pipeline(pipe):
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 32
    assert {type(block).__name__ for block in pipe.unet.down_blocks} == {"CrossAttnDownBlock2D"}
    assert {type(block).__name__ for block in pipe.unet.up_blocks} == {"CrossAttnUpBlock2D"}


def test_tokenizer_has_one_token_for_each_word_and_bytes_for_others(pipe):
    tokenizer = pipe.tokenizer
    assert tokenizer.model_max_length == 16
    for word in WORDS:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.decode(tokenizer("a Zebra, naïve").input_ids, skip_special_tokens=True) == "a zebra , naïve"
    ids = tokenizer("a red star", padding="max_length").input_ids
    end = tokenizer.eos_token_id
    assert ids[0] == tokenizer.bos_token_id and ids[4:] == [end] * 12 and end not in ids[:4]


def test_latents_are_white(pipe):
    z = _latents(pipe, [shapes_item("sub", index).images[0] for index in range(100)])
    assert z.mean((0, 2, 3)).abs().max() < 0.2
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.2


def test_vae_keeps_the_pictures(pipe):
    image = shapes_item("sub", 0).images[0]
    z = _latents(pipe, [image]) / pipe.vae.config.scaling_factor
    with torch.no_grad():
        back = pipe.vae.decode(z).sample
    assert (back - _pixels([image])).abs().mean() < 0.1


def _pixels(images):
    arrays = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


@torch.no_grad()
def _latents(pipe, images):
    return pipe.vae.config.scaling_factor * pipe.vae.encode(_pixels(images)).latent_dist.mean


@torch.no_grad()
def _denoising(pipe, images, texts):
    """B of each pair (images[i], texts[i]), 5 timesteps: how much the text helps to find the noise."""
    z = _latents(pipe, images)
    ids = pipe.tokenizer([*texts, ""], padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(ids).last_hidden_state
    total = torch.zeros(len(images))
    for t in timestep_grid(5):
        noise, alpha_bar = shared_noise(0, t, z.shape[1:]), pipe.scheduler.alphas_cumprod[t]
        zt = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
        guesses = [pipe.unet(zt, t, s).sample for s in (states[-1:].expand(len(images), -1, -1), states[:-1])]
        without, given = ((noise - guess).flatten(1).norm(dim=1) for guess in guesses)
        total += without - given
    return total


@pytest.mark.parametrize("kind", ["sub", "obj", "verb"])
def test_model_matches_held_out_scenes(pipe, kind):
    items = [shapes_item(kind, index) for index in range(12)]
    images = [image for item in items for image in item.images]
    scores = _denoising(pipe, images, [item.texts[0] for item in items for _ in item.images]).view(-1, 2)
    right = (scores.argmax(1) == torch.tensor([item.label for item in items])).sum()
    assert right >= 11  # of 12; chance is 6
