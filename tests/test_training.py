"""The training step: the released code's loss and gradients, and the same gradient however it is computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.plain import plain_terms
from conftest import GOLDEN
from diffusers_dsd.images import open_image
from diffusers_dsd.prompts import (
    add_attention_prompts,
    attention_prompts_of,
    read_attention_prompts,
    set_attention_prompts,
)
from diffusers_dsd.scoring import Draws
from diffusers_dsd.training import Example, draw_timestep_and_noise, hinge_step
from models import tiny_pipeline, tiny_sdxl
from test_scoring import TEXTS, pictures


def through_all_candidates(pipe, images, texts, examples, draws, score, halves, margin, scale):
    """The obvious way: every candidate with gradient, one by one, and one backward pass through all of them."""
    loss, all_scores = 0.0, []
    for example in examples:
        scores = []
        for image, text, draw in example.candidates:
            terms = plain_terms(pipe, images[image], texts[text], int(draws.timesteps[draw]), draws.noise[draw])
            scores.append(terms.score(score, halves))
        negatives = torch.stack([s for i, s in enumerate(scores) if i != example.positive])
        loss = loss + torch.relu(margin + negatives.max() - scores[example.positive])
        all_scores.append([s.item() for s in scores])
    (scale * loss).backward()
    return loss.item(), all_scores


def gradients(unet):
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("score", ["hybrid", "attention"])
@pytest.mark.parametrize("way", ["two passes", "all candidates"])
def test_loss_and_gradients_match_the_released_code(golden_pipe, golden_noise, golden_images, expected, score, way):
    golden = json.loads((GOLDEN / "expected_training_step.json").read_text())[score]
    unet = golden_pipe.unet
    add_attention_prompts(unet, rank=4, seed=0)
    set_attention_prompts(unet, read_attention_prompts(GOLDEN / "lora-legacy").state_dict)
    images = [open_image(path) for path in golden_images[:2]]
    latents = golden_pipe.encode_images(images)
    prompts = golden_pipe.encode_texts(expected["texts"][:1])
    draws = Draws(torch.tensor([golden["timestep"]]), golden_noise[golden["noise_index"]][None])
    examples = [Example([(0, 0, 0), (1, 0, 0)], positive=0)]
    how = (examples, draws, score, "both", golden["margin"], 1.0)
    if way == "two passes":
        outcome = hinge_step(golden_pipe.denoiser, latents, prompts, *how, backward=torch.Tensor.backward, batch_size=4)
        loss, scores = outcome.loss, outcome.scores
    else:
        loss, scores = through_all_candidates(golden_pipe, images, expected["texts"][:1], *how)
    assert loss == pytest.approx(golden["loss"], abs=1e-4)
    assert scores[0] == pytest.approx(golden["scores"][0], abs=1e-4)

    expected_grads = load_file(GOLDEN / f"lora_grads_{score}.safetensors")
    assert len(expected_grads) == golden["n"]
    names = {"lora_A": "down", "lora_B": "up"}
    found = {}
    for name, grad in gradients(unet).items():
        module, projection, matrix, _, _ = name.replace("to_out.0", "to_out").rsplit(".", 4)
        found[f"{module}.processor.{projection}_lora.{names[matrix]}.weight"] = grad
    assert expected_grads.keys() <= found.keys()
    for name, grad in found.items():
        if name not in expected_grads:
            assert grad.abs().max() == 0, "the last block's outputs do not reach the attention score"
            continue
        difference = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
        assert difference < 1e-3, name
    norm = torch.stack([grad.norm() for grad in found.values()]).norm().item()
    assert norm == pytest.approx(golden["grad_norm"], rel=1e-3)


def a_batch(pipe, independent=False):
    """3 examples: 1 text among 3 images, 1 image among 3 texts, 1 text among 2 images; some meet a margin of 0."""
    candidates = [[(0, 0), (1, 0), (2, 0)], [(1, 0), (1, 1), (1, 2)], [(2, 2), (0, 2)]]
    drawn, examples = [], []
    for pairs in candidates:
        rows = []
        for place, (image, text) in enumerate(pairs):
            if independent or place == 0:
                drawn.append(draw_timestep_and_noise(0, len(drawn), (4, 8, 8)))
            rows.append((image, text, len(drawn) - 1))
        examples.append(Example(rows, positive=1))
    draws = Draws(torch.tensor([t for t, _ in drawn]), torch.stack([noise for _, noise in drawn]))
    return pipe.encode_images(pictures(3)), pipe.encode_texts(TEXTS), examples, draws


def trainable(make=tiny_pipeline):
    """A tiny model whose attention prompts already do something, so that every tensor has a gradient."""
    pipe = make()
    weights = add_attention_prompts(pipe.unet, rank=4, seed=1)
    torch.manual_seed(2)
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.3)
    return pipe


@pytest.mark.parametrize("score", ["hybrid", "attention", "denoising"])
@pytest.mark.parametrize("halves", ["cond", "both"])
@pytest.mark.parametrize("margin", [0.1, 5.0])
@pytest.mark.parametrize("independent", [False, True])
def test_two_passes_give_the_gradient_through_all_candidates(score, halves, margin, independent):
    pipe = trainable()
    latents, prompts, examples, draws = a_batch(pipe, independent)
    how = (examples, draws, score, halves, margin, 1 / 3)
    outcome = hinge_step(pipe.denoiser, latents, prompts, *how, backward=torch.Tensor.backward, batch_size=5)
    loss, scores, fast = outcome.loss, outcome.scores, gradients(pipe.unet)
    pipe = trainable()
    slow_loss, slow_scores = through_all_candidates(pipe, pictures(3), TEXTS, *how)
    slow = gradients(pipe.unet)
    assert loss == pytest.approx(slow_loss, abs=1e-5) and loss > 0
    assert sum(scores, []) == pytest.approx(sum(slow_scores, []), abs=1e-5)  # noqa: RUF017
    for name, grad in slow.items():
        torch.testing.assert_close(fast.get(name, torch.zeros_like(grad)), grad, atol=1e-5, rtol=1e-4)
    assert sum(grad.abs().sum() for grad in fast.values()) > 0


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
def test_gradient_checkpointing_and_small_batches_change_nothing(make):
    grads = []
    for checkpointing, batch_size in ((False, 16), (True, 1)):
        pipe = trainable(make)
        pipe.unet.train()
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        hinge_step(
            pipe.denoiser, *a_batch(pipe), "hybrid", "cond", 1.0, 1 / 3, torch.Tensor.backward, batch_size
        )  # fmt: skip
        grads.append(gradients(pipe.unet))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


def test_only_the_rows_that_count_carry_gradient(monkeypatch):
    pipe = trainable()
    latents, prompts, examples, draws = a_batch(pipe)
    calls, forward = [], pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *a, **k: calls.append((len(x), torch.is_grad_enabled())) or forward(x, *a, **k)
    )
    arguments = dict(score="hybrid", halves="cond", scale=1.0, backward=torch.Tensor.backward, batch_size=16)
    hinge_step(pipe.denoiser, latents, prompts, examples[1:2], draws, margin=9.0, **arguments)
    assert calls == [(4, False), (2, True)], "the empty text's row of one image cancels"
    calls.clear()
    hinge_step(pipe.denoiser, latents, prompts, examples[:1], draws, margin=9.0, **arguments)
    assert calls == [(6, False), (4, True)]
    calls.clear()
    hinge_step(pipe.denoiser, latents, prompts, examples[:1], draws, margin=-9.0, **arguments)
    assert calls == [(6, False)], "the margin is met, so there is nothing to learn"


def test_new_prompts_change_nothing_and_are_float32():
    pipe = tiny_pipeline()
    before = pipe.score(pictures(1), TEXTS, sampling_steps=2).scores
    weights = add_attention_prompts(pipe.unet, rank=2, seed=0)
    torch.testing.assert_close(pipe.score(pictures(1), TEXTS, sampling_steps=2).scores, before)
    assert (
        len(weights) == 2 * 4 * 2 * 7
    )  # two matrices of four projections of self- and cross-attention, 7 transformers
    half = tiny_pipeline()
    half.unet.to(torch.bfloat16)
    assert {weight.dtype for weight in add_attention_prompts(half.unet, rank=2, seed=0)} == {torch.float32}
    same = add_attention_prompts(tiny_pipeline().unet, rank=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert len(attention_prompts_of(pipe.unet)) == len(weights)


def test_draws_depend_on_seed_and_number_alone():
    assert torch.equal(draw_timestep_and_noise(1, 2, (4, 8, 8))[1], draw_timestep_and_noise(1, 2, (4, 8, 8))[1])
    timesteps = [draw_timestep_and_noise(0, i, (1, 1, 1))[0] for i in range(2000)]
    assert min(timesteps) >= 0 and max(timesteps) <= 999 and 480 < sum(timesteps) / 2000 < 520
    offset = torch.stack(
        [draw_timestep_and_noise(0, i, (4, 8, 8), noise_offset=1.0)[1].mean((1, 2)) for i in range(99)]
    )
    assert 0.8 < offset.std() < 1.2
