"""The formula against a slow, obvious implementation, and that a score depends on its pair alone."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from benchmarks.plain import plain_score
from diffusers_dsd import DSDError
from diffusers_dsd.prompts import WEIGHTS_NAME, expected_shapes
from diffusers_dsd.schedule import shared_noise, timestep_grid
from diffusers_dsd.scoring import num_rows
from models import tiny_pipeline, tiny_sdxl

TEXTS = ["a red circle", "two dogs left of a tree", "a man at a table"]


def pictures(count=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("score", ["hybrid", "attention", "denoising"])
@pytest.mark.parametrize("halves", ["cond", "both"])
def test_scores_match_the_slow_implementation(prediction_type, score, halves):
    pipe, images = tiny_pipeline(prediction_type), pictures(2)
    out = pipe.score(images, TEXTS, sampling_steps=4, score=score, halves=halves, seed=7)
    noise = torch.stack([shared_noise(7, t, (4, 8, 8)) for t in timestep_grid(4)])
    assert out.scores.shape == (2, 3) and out.scores.dtype == torch.float32
    for i, image in enumerate(images):
        for j, text in enumerate(TEXTS):
            slow = plain_score(pipe, image.convert("RGB"), text, timestep_grid(4), noise, score, halves)
            assert out.scores[i, j].item() == pytest.approx(slow, abs=1e-5)
    torch.testing.assert_close(out.per_timestep.mean(0), out.scores)
    assert out.timesteps == timestep_grid(4) and len(out.per_timestep) == len(out.timesteps)
    assert (out.attention is None) == (score == "denoising")
    assert (out.denoising is None) == (score == "attention")
    if score == "hybrid":
        torch.testing.assert_close(out.attention + out.denoising, out.scores)
        weighted = pipe.score(images, TEXTS, sampling_steps=4, halves=halves, seed=7, attention_weight=0.25)
        torch.testing.assert_close(0.25 * out.attention + out.denoising, weighted.scores)


@pytest.mark.parametrize("halves", ["cond", "both"])
def test_the_denoising_term_can_leave_the_prompts_out(halves, tmp_path):
    """The attention term of the tuned model and the denoising term of the untuned one; other LoRA count in both."""
    pipe, images = tiny_pipeline(), pictures(2)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    how = dict(sampling_steps=4, halves=halves, seed=7)
    untuned = pipe.score(images, TEXTS, **how)
    torch.manual_seed(0)
    prompts = {}
    for name, (out_features, in_features) in expected_shapes(pipe.unet).items():
        prompts[f"unet.{name}.lora_A.weight"] = torch.randn(4, in_features)
        prompts[f"unet.{name}.lora_B.weight"] = 0.1 * torch.randn(out_features, 4)
    save_file(prompts, tmp_path / WEIGHTS_NAME)
    pipe.load_attention_prompts(tmp_path)
    pipe.unet.set_adapters(["style", "dsd"])
    tuned = pipe.score(images, TEXTS, **how)
    assert (tuned.denoising - untuned.denoising).abs().max() > 1e-3 < (tuned.attention - untuned.attention).abs().max()
    rows = []
    mixed = pipe.score_items([(images, TEXTS)], untuned_denoising=True, on_batch=rows.append, **how)[0]
    torch.testing.assert_close(mixed.attention, tuned.attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.denoising, untuned.denoising, atol=1e-6, rtol=0)
    assert sum(rows) == num_rows(2, len(TEXTS), 4, "hybrid", halves, apart=True)
    alone = pipe.score(images, TEXTS, score="denoising", untuned_denoising=True, **how)
    torch.testing.assert_close(alone.scores, untuned.denoising, atol=1e-6, rtol=0)
    torch.testing.assert_close(pipe.score(images, TEXTS, **how).scores, tuned.scores, atol=0, rtol=0)  # on again


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
def test_a_score_does_not_depend_on_batch_order_or_company(make):
    pipe, images = make(), pictures(5)
    alone = pipe.score(images[3], TEXTS[1], sampling_steps=4, batch_size=1).scores.item()
    among_strangers = pipe.score(images, TEXTS, sampling_steps=4, batch_size=16).scores[3, 1].item()
    odd_batches = pipe.score(images, TEXTS, sampling_steps=4, batch_size=7).scores[3, 1].item()
    other_order = pipe.score(images[::-1], TEXTS[::-1], sampling_steps=4).scores[1, 1].item()
    assert [among_strangers, odd_batches, other_order] == pytest.approx([alone] * 3, abs=1e-5)


def test_items_scored_together_get_what_they_get_apart():
    pipe, images = tiny_pipeline(), pictures(3)
    items = [(images[:2], TEXTS[:1]), (images[:1], TEXTS), (images[1:], TEXTS[1:])]
    together = pipe.score_items(items, sampling_steps=3, batch_size=5)
    for item, output in zip(items, together, strict=True):
        apart = pipe.score(*item, sampling_steps=3)
        torch.testing.assert_close(output.scores, apart.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.denoising, apart.denoising, atol=1e-5, rtol=0)


def count_calls(pipe, monkeypatch):
    """Numbers of rows that the VAE, the text encoder and the UNet are given, in calls and in all."""
    rows = {"vae": [], "text": [], "unet": []}
    encode, unet, text = pipe.vae.encode, pipe.unet.forward, pipe.text_encoder.forward
    monkeypatch.setattr(pipe.vae, "encode", lambda x: rows["vae"].append(len(x)) or encode(x))
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *a, **k: rows["unet"].append(len(x)) or unet(x, *a, **k))
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda x, **k: rows["text"].append(len(x)) or text(x, **k))
    return rows


def test_no_work_is_repeated(monkeypatch):
    pipe, images = tiny_pipeline(), pictures(2)
    rows = count_calls(pipe, monkeypatch)
    pipe.score_items([(images, TEXTS), (images[:1], TEXTS[:2])], sampling_steps=5, batch_size=16)
    assert sum(rows["vae"]) == 2, "each image once"
    assert sum(rows["text"]) == len(TEXTS) + 1, "each text once, and the empty one"
    assert sum(rows["unet"]) == 5 * (2 + 6), "the empty half once per image and timestep, a pair in two items once"
    assert rows["unet"] == [16, 16, 8], "batches are full across images, texts and timesteps"


@pytest.mark.parametrize(("halves", "empties"), [("cond", 0), ("both", 2)])
def test_the_empty_half_is_computed_only_where_the_score_needs_it(monkeypatch, halves, empties):
    pipe = tiny_pipeline()
    rows = count_calls(pipe, monkeypatch)
    pipe.score(pictures(2), TEXTS, sampling_steps=1, score="attention", halves=halves)
    assert sum(rows["unet"]) == 2 * 3 + empties


def test_noise_is_shared_and_can_be_given():
    pipe, images = tiny_pipeline(), pictures(2)
    noise = torch.stack([shared_noise(3, t, (4, 8, 8)) for t in timestep_grid(2)])
    given = pipe.score(images, TEXTS, sampling_steps=2, noise=noise)
    torch.testing.assert_close(given.scores, pipe.score(images, TEXTS, sampling_steps=2, seed=3).scores)
    assert (given.scores - pipe.score(images, TEXTS, sampling_steps=2, seed=4).scores).abs().max() > 1e-4
    with pytest.raises(DSDError, match=r"noise is \(1, 4, 8, 8\)"):
        pipe.score(images, TEXTS, sampling_steps=2, noise=noise[:1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sampling_steps": 0}, "choose a number from 1 to 1000"),
        ({"score": "best"}, "no score 'best'"),
        ({"halves": "left"}, "no halves 'left'"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"attention_weight": float("nan")}, "attention weight is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"texts": []}, "nothing to score"),
        ({"texts": [None]}, "give strings"),
        ({"images": ["no/such.png"]}, "no/such.png"),
        ({"images": [torch.zeros(3, 8, 8)]}, r"takes \(3, 16, 16\)"),
        ({"images": [torch.full((3, 16, 16), 255.0)]}, r"outside \[-1, 1\]"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    with pytest.raises(DSDError, match=sentence):
        tiny_pipeline().score(**{"images": pictures(1), "texts": TEXTS, "sampling_steps": 1} | change)
