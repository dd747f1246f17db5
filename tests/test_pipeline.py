"""`DSDPipeline` as a Diffusers pipeline: loading, converting, dtype, offloading, other people's LoRA."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_dsd import DSDError, DSDPipeline
from diffusers_dsd.denoiser import make_denoiser
from models import pipeline_around, tiny_pipeline, tiny_sdxl, tiny_unet
from test_scoring import TEXTS, pictures


def scores(pipe, **options):
    return pipe.score(pictures(2), TEXTS, sampling_steps=2, **options).scores


def test_save_and_load(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = DSDPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(scores(loaded), scores(pipe), atol=1e-6, rtol=0)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == torch.float32


def test_loads_a_stable_diffusion_folder_without_its_safety_checker(tmp_path):
    pipe = tiny_pipeline()
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    # As in a released model: the index names a safety checker, whose weights are not even there.
    index = index.replace(
        '"safety_checker": [\n    null,\n    null\n  ]',
        '"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]',
    )
    assert "StableDiffusionSafetyChecker" in index
    (tmp_path / "model_index.json").write_text(index)
    torch.testing.assert_close(scores(DSDPipeline.from_pretrained(tmp_path)), scores(pipe), atol=1e-6, rtol=0)


def test_from_pipe_both_ways_shares_the_models():
    pipe = tiny_pipeline()
    drawing = StableDiffusionPipeline.from_pipe(pipe, safety_checker=None, feature_extractor=None)
    assert drawing.unet is pipe.unet
    back = DSDPipeline.from_pipe(drawing)
    assert back.unet is pipe.unet
    torch.testing.assert_close(scores(back), scores(pipe))


def test_bfloat16_weights_give_float32_scores_close_by(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    half = DSDPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    assert scores(half).dtype == torch.float32
    torch.testing.assert_close(scores(half), scores(pipe), atol=0.1, rtol=0)


def test_group_offloading_gives_the_same_scores():
    """CPU offloading needs an accelerator to come back from; group offloading works on the CPU as well."""
    pipe, offloaded = tiny_pipeline(), tiny_pipeline()
    for part in (offloaded.unet, offloaded.vae):
        part.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(scores(offloaded), scores(pipe), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="model offloading needs a GPU")
def test_model_offloading_gives_the_same_scores():
    pipe, offloaded = tiny_pipeline(), tiny_pipeline()
    offloaded.enable_model_cpu_offload()
    torch.testing.assert_close(scores(offloaded), scores(pipe), atol=1e-3, rtol=0)


def test_somebody_elses_lora_counts(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, plain = tiny_pipeline(), scores(tiny_pipeline())
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    expected = scores(pipe)
    other = tiny_pipeline()
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(scores(other), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-3
    other.unload_lora_weights()
    torch.testing.assert_close(scores(other), plain)


def test_a_long_text_is_truncated_and_reported_once(caplog):
    pipe, long_text = tiny_pipeline(), "dog " * 200
    with caplog.at_level("WARNING", logger="diffusers_dsd"):
        first = pipe.score(pictures(1), [long_text, TEXTS[0]], sampling_steps=1).scores
        pipe.score_items([(pictures(1), [long_text])], sampling_steps=1, names=["7"])
        pipe.score_items([(pictures(1), ["cat " * 80])], sampling_steps=1, names=["8"])
    reports = [record.message for record in caplog.records if "tokens count" in record.message]
    assert "item 8: " in reports.pop()
    assert len(reports) == 1 and "first 75 of 200 tokens" in reports[0] and "'dog dog" in reports[0]
    cut = pipe.score(pictures(1), ["dog " * 75], sampling_steps=1).scores
    torch.testing.assert_close(cut[0, 0], first[0, 0], atol=1e-5, rtol=0)


def test_sdxl_empty_text_is_zeros_as_it_was_trained():
    prompts = tiny_sdxl().encode_texts(TEXTS)
    assert prompts.embeds.shape == (4, 77, 48) and prompts.pooled.shape == (4, 24)
    assert prompts.embeds[-1].abs().max() == 0 and prompts.embeds[0].abs().max() > 0
    assert prompts.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]


def test_tensors_paths_and_pictures_are_the_same_image(tmp_path):
    from diffusers_dsd.images import to_tensor

    pipe, image = tiny_pipeline(), pictures(1)[0]
    image.save(tmp_path / "image.png")
    expected = pipe.score(image, "a dog", sampling_steps=1).scores
    for same in (to_tensor(image, 16), to_tensor(image, 16)[None], str(tmp_path / "image.png"), [image]):
        torch.testing.assert_close(pipe(same, "a dog", sampling_steps=1).scores, expected)


def test_models_that_cannot_be_scored_are_refused():
    with pytest.raises(DSDError, match="takes 9 channels"):
        pipeline_around(tiny_unet(in_channels=9))
    pipe = tiny_pipeline("sample")
    with pytest.raises(DSDError, match="predicts 'sample'"):
        scores(pipe)
    pipe.scheduler = DDIMScheduler(num_train_timesteps=500)
    with pytest.raises(DSDError, match="trained with 500 timesteps"):
        make_denoiser(pipe.unet, pipe.scheduler)


def test_not_a_number_is_an_error():
    pipe = tiny_pipeline()
    torch.nn.init.constant_(pipe.unet.conv_in.weight, float("nan"))
    with pytest.raises(DSDError, match="not a number"):
        scores(pipe)
