"""Parity with the paper's released code: every number of tests/golden, to 1e-4."""

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN


@pytest.mark.parametrize("weights", ["base", "lora"])
@pytest.mark.parametrize(
    ("steps", "score"), [(1, "hybrid"), (1, "attention"), (5, "hybrid"), (5, "attention"), (10, "hybrid")]
)
def test_scores_match_the_released_code(golden_pipe, golden_noise, golden_images, expected, weights, score, steps):
    if weights == "lora":
        golden_pipe.load_attention_prompts(GOLDEN / "lora-legacy")
    result = expected["results"][weights][f"steps={steps},{score}"]
    pairs = [tuple(map(int, pair.split(","))) for pair in result["scores"]]
    used_images, used_texts = (sorted(set(part)) for part in zip(*pairs, strict=True))
    out = golden_pipe.score(
        [golden_images[i] for i in used_images],
        [expected["texts"][j] for j in used_texts],
        sampling_steps=steps,
        score=score,
        halves="both",
        noise=golden_noise[: len(next(iter(result["per_timestep"].values())))],
    )
    for i, j in pairs:
        at = used_images.index(i), used_texts.index(j)
        per_timestep = torch.tensor(result["per_timestep"][f"{i},{j}"])
        torch.testing.assert_close(out.per_timestep[:, *at], per_timestep, atol=1e-4, rtol=0)
        assert out.scores[at].item() == pytest.approx(result["scores"][f"{i},{j}"], abs=1e-4)


def test_every_expected_value_is_compared(expected):
    """`steps=10,attention` is the one entry without values; anything else would be missing above."""
    for results in expected["results"].values():
        assert [name for name, result in results.items() if not result["scores"]] == ["steps=10,attention"]
        assert len(results) == 6


def test_latents_and_prompt_embeddings_match(golden_pipe, golden_images, expected):
    golden = load_file(GOLDEN / "intermediates.safetensors")
    torch.testing.assert_close(golden_pipe.encode_images(golden_images), golden["latents"], atol=1e-4, rtol=1e-4)
    prompts = golden_pipe.encode_texts(expected["texts"][:1])
    torch.testing.assert_close(prompts.embeds[:1], golden["prompt_embeds_0"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prompts.embeds[1:], golden["uncond_embeds"], atol=1e-4, rtol=1e-4)


def test_golden_noise_is_as_described(golden_noise):
    golden = load_file(GOLDEN / "intermediates.safetensors")
    torch.testing.assert_close(golden_noise[:10], golden["noise_first_10"], atol=0, rtol=0)
