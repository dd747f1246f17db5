"""Which layers are read, what is read, and that the UNet comes back as it was."""

import pytest
import torch
from diffusers import UNet2DModel  # noqa: F401 - the import is part of the test that diffusers is not shadowed

from diffusers_dsd.attention import read_attention, scored_layers
from models import UNETS, tiny_pipeline, tiny_unet, unet_without_weights

SIX = [
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.2.transformer_blocks.0.attn2",
]
SDXL = [  # only the last of each transformer's blocks
    "down_blocks.2.attentions.0.transformer_blocks.9.attn2",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2",
    "mid_block.attentions.0.transformer_blocks.9.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.1.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.1.attn2",
    "up_blocks.1.attentions.2.transformer_blocks.1.attn2",
]


@pytest.mark.parametrize("version", UNETS)
def test_scored_layers_of_the_real_architectures(version):
    assert scored_layers(unet_without_weights(version)) == (SDXL if version == "sdxl" else SIX)


def inputs(unet, rows=3):
    generator = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    latents = torch.randn(rows, 4, size, size, generator=generator)
    embeds = torch.randn(rows, 7, unet.config.cross_attention_dim, generator=generator)
    return latents, torch.tensor([3, 400, 999])[:rows], embeds


def test_the_output_is_the_unpatched_one_and_the_reading_the_plain_formula():
    """The logits are recomputed here from each scored layer's own inputs, with plain softmax attention."""
    unet = tiny_pipeline().unet
    captured = {}
    for name in scored_layers(unet):
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: captured.__setitem__(
                name, (module, args[0], kwargs["encoder_hidden_states"])
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        plain = unet(*inputs(unet)).sample
        with read_attention(unet) as reader:
            patched = unet(*inputs(unet)).sample
    torch.testing.assert_close(patched, plain, atol=1e-5, rtol=1e-5)
    layer_means = []
    for module, hidden, text in captured.values():
        query, key = module.to_q(hidden), module.to_k(text)
        width = query.shape[-1] // module.heads
        per_head = []
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            logits = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
            per_head.append(torch.log(torch.exp(logits).sum(-1)).mean(-1))
        layer_means.append(torch.stack(per_head).mean(0))
    torch.testing.assert_close(reader.mean(), torch.stack(layer_means).mean(0), atol=1e-5, rtol=1e-5)


def test_the_reading_carries_gradient():
    unet = tiny_pipeline().unet
    with read_attention(unet) as reader:
        unet(*inputs(unet))
        reader.mean().sum().backward()
    layer = unet.get_submodule(scored_layers(unet)[0])
    assert layer.to_k.weight.grad.abs().max() > 0


def test_processors_come_back_also_after_an_exception():
    unet = tiny_pipeline().unet
    before = dict(unet.attn_processors)
    with pytest.raises(RuntimeError, match="boom"), read_attention(unet):
        assert unet.attn_processors != before
        raise RuntimeError("boom")
    assert unet.attn_processors.keys() == before.keys()
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_float16_weights_are_read_in_float32():
    unet = tiny_pipeline().unet.to(torch.bfloat16)
    latents, timesteps, embeds = inputs(unet)
    with torch.no_grad(), read_attention(unet) as reader:
        unet(latents.bfloat16(), timesteps, embeds.bfloat16())
    assert reader.mean().dtype == torch.float32


def test_a_unet_without_cross_attention_is_refused():
    unet = tiny_unet(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
    )
    with pytest.raises(ValueError, match="no cross-attention"):
        scored_layers(unet)
