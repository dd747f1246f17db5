"""Savings that leave the score unchanged: what is computed once, not at all, or remembered."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import plain_score
from diffusers_dsd import DSDError, DSDPipeline
from diffusers_dsd.attention import EverythingRead, read_attention, scored_layers
from diffusers_dsd.features import FeatureCache
from diffusers_dsd.models import SHAPES_PROMPTS, SHAPES_SD
from diffusers_dsd.schedule import shared_noise, timestep_grid
from diffusers_dsd.shared_prefix import share_prefix, text_free_modules
from diffusers_dsd.timestep_weights import TimestepWeights, read_weights
from models import tiny_pipeline, tiny_sdxl, unet_without_weights
from test_scoring import TEXTS, count_calls, pictures

STEPS = 3


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, path in zip(pictures(3), paths, strict=True):
        picture.save(path)
    return paths


@pytest.mark.parametrize("paths", [("down",), ("mid",), ("down", "mid"), ("down", "mid", "up")])
def test_layers_are_those_asked_for(paths):
    pipe, images = tiny_pipeline(), pictures(2)
    noise = torch.stack([shared_noise(0, t, (4, 8, 8)) for t in timestep_grid(STEPS)])
    out = pipe.score(images, TEXTS, sampling_steps=STEPS, score="attention", layers=paths)
    for i, image in enumerate(images):
        for j, text in enumerate(TEXTS):
            slow = plain_score(pipe, image, text, timestep_grid(STEPS), noise, "attention", "cond", paths)
            assert out.scores[i, j].item() == pytest.approx(slow, abs=1e-5)


def flops_of_a_row(unet, **how):
    size = unet.config.sample_size
    with FlopCounterMode(display=False) as counter, torch.no_grad(), read_attention(unet, **how):
        try:
            inputs = torch.empty(1, 4, size, size, device="meta"), torch.empty(1, 77, 1024, device="meta")
            unet(inputs[0], torch.tensor(5, device="meta"), inputs[1])
        except EverythingRead:
            pass
    return counter.get_total_flops() / 1e9


def test_the_up_path_is_not_computed_where_it_is_not_read():
    """The figures of Stable Diffusion 2.1-base at 512²: 804 GFLOP a row, 255 until the middle is read."""
    unet = unet_without_weights("2.1-base")
    whole, attention_only = flops_of_a_row(unet), flops_of_a_row(unet, attention_only=True)
    half = flops_of_a_row(unet, paths=("down", "mid"), attention_only=True)
    assert whole == pytest.approx(804, abs=2)
    assert attention_only < whole - 10
    assert half == pytest.approx(255, abs=2)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
def test_rows_of_one_image_and_timestep_share_what_sees_no_text(make, monkeypatch):
    pipe, images = make(), pictures(2)
    given, forward = [], pipe.unet.conv_in.forward
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: given.append(len(x)) or forward(x))
    shared = pipe.score(images, TEXTS, sampling_steps=STEPS, batch_size=100)
    assert given == [STEPS * 2], "once per image and timestep, whatever the number of texts"
    alone = pipe.score(images, TEXTS, sampling_steps=STEPS, batch_size=1)
    torch.testing.assert_close(shared.scores, alone.scores, atol=1e-5, rtol=0)


def test_the_modules_are_as_before_also_after_a_failure():
    unet = tiny_pipeline().unet
    modules = text_free_modules(unet)
    assert len(modules) == 6, "convolution, resnet, and the transformer's norm, projection, self-attention and queries"
    before = [module.forward for module in modules]
    with pytest.raises(RuntimeError, match="boom"), share_prefix(unet):
        assert [module.forward for module in modules] != before
        raise RuntimeError("boom")
    assert [module.forward for module in modules] == before
    assert all("forward" not in module.__dict__ for module in modules)


def test_stable_diffusion_shares_a_twentieth():
    unet = unet_without_weights("2.1-base")
    modules = set(text_free_modules(unet))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.empty(1, 4, 64, 64, device="meta"), 5, torch.empty(1, 77, 1024, device="meta"))
    names = {f"UNet2DConditionModel.{name}" for name, module in unet.named_modules() if module in modules}
    shared = sum(sum(counter.get_flop_counts().get(name, {}).values()) for name in names)
    assert shared / counter.get_total_flops() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("halves", ["cond", "both"])
def test_a_cache_changes_no_score_and_repeats_no_work(files, tmp_path, monkeypatch, on_disk, halves):
    pipe = tiny_pipeline()
    folder = tmp_path / "features" if on_disk else None
    cache, how = FeatureCache(folder=folder), dict(sampling_steps=STEPS, halves=halves, batch_size=50)
    items = [(files[:2], TEXTS[:1]), (files[1:], TEXTS[1:])]
    expected = [pipe.score_items([item], **how)[0].scores for item in items]
    first = pipe.score_items(items[:1], cache=cache, **how)[0].scores
    rows = count_calls(pipe, monkeypatch)
    second = pipe.score_items(items[1:], cache=cache, **how)[0].scores
    assert (sum(rows["vae"]), sum(rows["text"])) == (1, 2), "one new picture, two new texts"
    assert sum(rows["unet"]) == STEPS * (4 + 1), "the empty text's rows of the new picture only"
    for calls in rows.values():
        calls.clear()
    later = FeatureCache(folder=folder) if on_disk else cache
    again = pipe.score_items(items[1:], cache=later, **how)[0].scores
    assert rows["vae"] == rows["text"] == [] and sum(rows["unet"]) == STEPS * 4
    for scores, exact in zip([first, second, again], [*expected, expected[1]], strict=True):
        torch.testing.assert_close(scores, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encodes", [True, False])
def test_what_is_encoded_ahead_is_not_encoded_again(files, tmp_path, monkeypatch, encodes):
    pipe, cache = tiny_pipeline(), FeatureCache()
    monkeypatch.setattr(DSDPipeline, "_encodes_ahead", encodes)  # as on a GPU
    rows = count_calls(pipe, monkeypatch)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.encode_ahead, [*files, broken, *files], TEXTS, 2, cache).result()
        pool.submit(pipe.encode_ahead, [], ["a surrogate \ud800"], 2, cache).result()  # of a later item, which says so
    assert (sum(rows["vae"]), sum(rows["text"])) == ((3, 4) if encodes else (0, 0)), "the empty text as well"
    out = pipe.score_items([(files, TEXTS)], sampling_steps=STEPS, cache=cache)[0]
    assert (sum(rows["vae"]), sum(rows["text"])) == (3, 4)
    expected = pipe.score_items([(files, TEXTS)], sampling_steps=STEPS)[0]
    torch.testing.assert_close(out.scores, expected.scores, atol=1e-5, rtol=0)
    with pytest.raises(DSDError, match=r"broken\.png"):
        pipe.encode_images([broken], cache)


def test_what_another_model_left_on_disk_is_not_taken(files, tmp_path):
    item = [(files[:1], TEXTS)]
    for seed in (0, 1):
        pipe = tiny_pipeline(seed=seed)
        cached = pipe.score_items(item, sampling_steps=2, cache=FeatureCache(folder=tmp_path / "features"))[0]
        torch.testing.assert_close(cached.scores, pipe.score_items(item, sampling_steps=2)[0].scores)


def test_prompts_count_as_other_weights(tmp_path):
    pipe = DSDPipeline.from_pretrained(SHAPES_SD)
    cache = FeatureCache(folder=tmp_path)
    prints = {cache.fingerprint(pipe.unet)}
    pipe.load_attention_prompts(SHAPES_PROMPTS)
    prints.add(cache.fingerprint(pipe.unet))
    pipe.unet.disable_adapters()
    prints.add(cache.fingerprint(pipe.unet))
    assert len(prints) == 3


def test_a_changed_picture_is_encoded_again_and_a_damaged_entry_computed_again(files, tmp_path):
    pipe, folder = tiny_pipeline(), tmp_path / "features"
    cache, how = FeatureCache(folder=folder), dict(sampling_steps=1)
    before = pipe.score_items([(files[:1], TEXTS)], cache=cache, **how)[0].scores
    for entry in folder.rglob("*.safetensors"):
        entry.write_bytes(b"damaged")
    repaired = pipe.score_items([(files[:1], TEXTS)], cache=FeatureCache(folder=folder), **how)[0].scores
    torch.testing.assert_close(repaired, before, atol=1e-6, rtol=0)
    pictures(2)[1].resize((31, 20)).save(files[0])
    after = pipe.score_items([(files[:1], TEXTS)], cache=cache, **how)[0].scores
    assert (after - before).abs().max() > 1e-4


def test_the_cache_is_bounded():
    cache, entry = FeatureCache(max_bytes=1000), {"latents": torch.zeros(100)}  # 400 bytes
    for number in range(4):
        cache.put(("latents", number), entry)
        cache.get(("latents", 0))  # used, so it stays
    assert [number for number in range(4) if cache.get(("latents", number))] == [0, 3]


def weights_of(num_layers=5, **change):
    attention = [[0.0] * num_layers, [0.5] * num_layers, [0.0, 2.0] + [0.0] * (num_layers - 2)]
    return TimestepWeights(
        **{"timesteps": [100, 500, 900], "attention": attention, "denoising": [1.0, 0.0, 3.0]} | change
    )


def test_weighted_scores_are_the_sum_of_weighted_terms(monkeypatch, tmp_path):
    pipe, images = tiny_pipeline(), pictures(2)
    layers = scored_layers(pipe.unet)
    weights = weights_of(len(layers))
    weights.save(tmp_path / "timestep_weights.json")
    assert read_weights(tmp_path) == weights
    rows = count_calls(pipe, monkeypatch)
    out = pipe.score(images, TEXTS, weights=read_weights(tmp_path), seed=4)
    assert sum(rows["unet"]) == 2 * 2 * (3 + 1) + 2 * 3, "no empty text where the denoising term counts nothing"
    for i, image in enumerate(images):
        for j, text in enumerate(TEXTS):
            expected = 0.0
            for t, a, b in zip(weights.timesteps, weights.attention, weights.denoising, strict=True):
                noise = shared_noise(4, t, (4, 8, 8))[None]
                expected += b * plain_score(pipe, image, text, [t], noise, "denoising")
                with read_attention(pipe.unet) as reader, torch.no_grad():
                    z = pipe.denoiser.add_noise(pipe.encode_images([image]), noise, torch.tensor([t]))
                    pipe.unet(z, t, pipe.encode_texts([text]).embeds[:1])
                expected += float((reader.by_layer()[0] * torch.tensor(a)).sum())
            assert out.scores[i, j].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(out.attention + out.denoising, out.scores)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There are no weights"),
        ("{}", "does not hold weights"),
        ("[1]", "does not hold weights"),
        ('{"timesteps": [5], "attention": [[-1.0]], "denoising": [1.0]}', "does not hold weights"),
        ('{"timesteps": [5, 5], "attention": [[1.0], [1.0]], "denoising": [1.0, 1.0]}', "does not hold weights"),
        ('{"timesteps": [5], "attention": [[NaN]], "denoising": [1.0]}', "does not hold weights"),
    ],
)
def test_bad_weights_are_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "weights.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DSDError, match=sentence):
        read_weights(file)


def test_weights_of_another_model_are_refused():
    with pytest.raises(DSDError, match="weights are of 2 scored layers"):
        tiny_pipeline().score(pictures(1), TEXTS, weights=weights_of(2))
