"""Attention prompts: both file forms, the real architecture, foreign and damaged checkpoints."""

import json
import os
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from conftest import GOLDEN
from diffusers_dsd import DSDError
from diffusers_dsd.prompts import (
    SETTINGS_NAME,
    WEIGHTS_NAME,
    check_prompts_fit,
    expected_shapes,
    read_attention_prompts,
)
from models import UNETS, pipeline_around, tiny_pipeline, unet_without_weights
from test_scoring import TEXTS, pictures


def random_prompts(unet, rank=4, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out_features, in_features) in expected_shapes(unet).items():
        tensors[f"unet.{name}.lora_A.weight"] = scale * torch.randn(rank, in_features, generator=generator)
        tensors[f"unet.{name}.lora_B.weight"] = scale * torch.randn(out_features, rank, generator=generator)
    return tensors


def legacy(tensors):
    """The same weights under the names of the paper's release."""
    names = {"lora_A": "down", "lora_B": "up"}
    renamed = {}
    for key, tensor in tensors.items():
        module, projection, matrix, _ = key.removeprefix("unet.").replace("to_out.0", "to_out").rsplit(".", 3)
        renamed[f"{module}.processor.{projection}_lora.{names[matrix]}.weight"] = tensor
    return renamed


def scores(pipe):
    return pipe.score(pictures(2), TEXTS, sampling_steps=2, halves="cond").scores


def test_both_forms_do_the_same_and_unloading_undoes_them(tmp_path):
    pipe = tiny_pipeline()
    before = scores(pipe)
    modules = {name: type(module) for name, module in pipe.unet.named_modules()}
    tensors = random_prompts(pipe.unet)
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "new" / WEIGHTS_NAME)
    torch.save(legacy(tensors), tmp_path / "old" / "pytorch_model.bin")
    changed = []
    for path in (tmp_path / "new", tmp_path / "old", tmp_path / "new" / WEIGHTS_NAME):
        pipe.load_attention_prompts(path)
        changed.append(scores(pipe))
    assert (changed[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(changed[1], changed[0], atol=0, rtol=0)
    torch.testing.assert_close(changed[2], changed[0], atol=0, rtol=0)
    pipe.unload_attention_prompts()
    torch.testing.assert_close(scores(pipe), before, atol=0, rtol=0)
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == modules
    pipe.unload_attention_prompts()  # nothing to undo is no mistake

    other = StableDiffusionPipeline.from_pipe(tiny_pipeline(), safety_checker=None, feature_extractor=None)
    other.load_lora_weights(tmp_path / "new")  # what Diffusers users do with the same folder
    from diffusers_dsd import DSDPipeline

    torch.testing.assert_close(scores(DSDPipeline.from_pipe(other)), changed[0], atol=1e-6, rtol=0)


def test_other_adapters_stay(tmp_path):
    from peft import LoraConfig

    pipe = tiny_pipeline()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), "style")
    before = scores(pipe)
    save_file(random_prompts(tiny_pipeline().unet), tmp_path / WEIGHTS_NAME)
    pipe.load_attention_prompts(tmp_path)
    assert (scores(pipe) - before).abs().max() > 1e-3
    pipe.unload_attention_prompts()
    assert list(pipe.unet.peft_config) == ["style"]
    torch.testing.assert_close(scores(pipe), before)


def test_metadata_scale_is_honoured(tmp_path):
    """PEFT scales by alpha / r; files without metadata are at scale 1."""
    tensors = random_prompts(tiny_pipeline().unet)
    halved = {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(halved, tmp_path / "plain.safetensors")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    save_file(tensors, tmp_path / "scaled.safetensors", metadata=metadata)
    read = [read_attention_prompts(tmp_path / f"{name}.safetensors").state_dict for name in ("plain", "scaled")]
    assert read[0].keys() == read[1].keys()
    assert all(torch.equal(read[0][key], read[1][key]) for key in read[0])


def test_auto_halves_follow_the_checkpoint(tmp_path):
    pipe = tiny_pipeline()
    assert pipe.resolve_halves("auto") == "cond"
    tensors = random_prompts(pipe.unet)
    torch.save(legacy(tensors), tmp_path / "pytorch_lora_weights.bin")
    pipe.load_attention_prompts(tmp_path)
    assert pipe.resolve_halves("auto") == "both"
    assert pipe.resolve_halves("cond") == "cond"
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / SETTINGS_NAME).write_text(json.dumps({"halves": "cond", "rank": 4}))
    pipe.load_attention_prompts(tmp_path)
    assert pipe.resolve_halves("auto") == "cond"
    pipe.unload_attention_prompts()
    assert pipe.resolve_halves("auto") == "cond"


def test_a_released_checkpoint_fits_the_real_architecture_and_changes_the_score(reference_data):
    """Stable Diffusion 2.1-base's UNet, all 866 M random weights of it, on small latents."""
    torch.manual_seed(0)
    pipe = pipeline_around(UNet2DConditionModel(**UNETS["2.1-base"] | {"sample_size": 8}))
    options = dict(sampling_steps=1, score="attention", halves="cond")
    before = pipe.score(pictures(1), TEXTS[:1], **options).scores
    prompts = read_attention_prompts(reference_data / "final-checkpoint-47500")
    assert len(prompts.state_dict) == 256 and prompts.legacy
    check_prompts_fit(prompts, pipe.unet, "2.1-base")  # no missing, no unexpected, every shape
    pipe.load_attention_prompts(reference_data / "final-checkpoint-47500")
    assert (pipe.score(pictures(1), TEXTS[:1], **options).scores - before).abs().max() > 1e-4


def test_a_released_checkpoint_is_refused_by_other_models(reference_data):
    prompts = read_attention_prompts(reference_data / "final-checkpoint-47500")
    for version in ("1.5", "sdxl"):
        with pytest.raises(DSDError, match=rf"final-checkpoint-47500.* another model than SD {version}"):
            check_prompts_fit(prompts, unet_without_weights(version), f"SD {version}")
    with pytest.raises(DSDError, match="another model"):
        tiny_pipeline().load_attention_prompts(reference_data / "final-checkpoint-47500")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_bad_checkpoints_are_one_sentence_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline()
    before = scores(pipe)
    good = random_prompts(pipe.unet)
    some = next(iter(good))
    save_file(good, "good.safetensors")
    with open("truncated.safetensors", "wb") as file:
        file.write(open("good.safetensors", "rb").read()[:5000])  # noqa: SIM115
    save_file({k: v for k, v in good.items() if k != some}, "missing.safetensors")
    save_file(good | {"unet.a.to_q.lora_A.weight": torch.ones(4, 4)}, "unexpected.safetensors")
    save_file(good | {"unet.conv_in.weight": torch.ones(4)}, "foreign.safetensors")
    save_file(good | {some: torch.full_like(good[some], torch.nan)}, "nan.safetensors")
    save_file(good | {some: good[some][:2].contiguous()}, "ranks.safetensors")
    torch.save({k: v[:0] if ".lora_A" in k else v[:, :0].clone() for k, v in good.items()}, "rankless.bin")
    torch.save(good | {some: torch.ones(1, 1).expand(100_000, 100_000)}, "repeated.bin")
    torch.save(good | {some: good[some].to_sparse()}, "sparse.bin")
    torch.save(good | {some: good[some] * 1j}, "complex.bin")
    torch.save({"x": Bomb()}, "bomb.bin")
    with open("plain_bomb.bin", "wb") as file:
        pickle.dump(Bomb(), file)
    torch.save([1, 2], "list.bin")
    open("empty.bin", "w").close()
    os.mkdir("folder")
    for path, words in {
        "truncated.safetensors": "cannot be read",
        "missing.safetensors": "it has no",
        "unexpected.safetensors": "it has a.to_q, which the model has not",
        "foreign.safetensors": "not part of an attention prompt",
        "nan.safetensors": "NaN",
        "ranks.safetensors": "differ in rank",
        "rankless.bin": "are empty",
        "repeated.bin": "in a form that no weight has",
        "sparse.bin": "in a form that no weight has",
        "complex.bin": "in a form that no weight has",
        "bomb.bin": "bomb.bin",
        "plain_bomb.bin": "plain_bomb.bin",
        "list.bin": "not a dictionary of tensors",
        "empty.bin": "empty.bin",
        "folder": "holds none of",
        "nowhere": "no checkpoint at",
    }.items():
        with pytest.raises(DSDError, match=words) as error:
            pipe.load_attention_prompts(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("exploded")
    assert pipe.attention_prompts is None
    torch.testing.assert_close(scores(pipe), before, atol=0, rtol=0)


def test_the_golden_checkpoint_is_legacy():
    prompts = read_attention_prompts(GOLDEN / "lora-legacy")
    assert len(prompts.state_dict) == 256 and prompts.legacy and prompts.halves == "both"
