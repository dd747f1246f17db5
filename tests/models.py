"""Randomly initialised models: tiny ones to compute with, and the real architectures by their configurations."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conftest import GOLDEN
from diffusers_dsd import DSDPipeline

# UNet configurations of the released models (what differs from Diffusers' defaults).
UNETS = {
    "1.5": dict(sample_size=64, cross_attention_dim=768),
    "2.1-base": dict(
        sample_size=64,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    ),
    "2.1-v": dict(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "sdxl": dict(
        sample_size=128,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[320, 640, 1280],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}


def unet_without_weights(version: str) -> UNet2DConditionModel:
    """A real architecture on the meta device: every module and shape, no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[version])


def text_encoder(width: int, layers: int = 1, projection: int | None = None) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(GOLDEN / "tiny-sd" / "tokenizer", local_files_only=True)


def tiny_vae() -> AutoencoderKL:
    """16×16 pictures, 4×8×8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def pipeline_around(unet: UNet2DConditionModel, prediction_type: str = "epsilon", **parts) -> DSDPipeline:
    """A pipeline whose VAE and text encoder are tiny and fit the UNet."""
    pipe = DSDPipeline(
        vae=tiny_vae(),
        text_encoder=parts.pop("text_encoder", None) or text_encoder(unet.config.cross_attention_dim),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(**config) -> UNet2DConditionModel:
    """Cross-attention at two levels and the middle, on 8×8 latents."""
    return UNet2DConditionModel(
        **dict(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=32,
        )
        | config
    )


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> DSDPipeline:
    torch.manual_seed(seed)
    return pipeline_around(tiny_unet(), prediction_type)


def tiny_sdxl(seed: int = 0) -> DSDPipeline:
    """SDXL's two text encoders, pooled text and time ids, at small width; 2 blocks in each transformer."""
    torch.manual_seed(seed)
    unet = tiny_unet(
        cross_attention_dim=16 + 32,
        transformer_layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 24,
    )
    return pipeline_around(
        unet,
        text_encoder=text_encoder(16, layers=2),
        text_encoder_2=text_encoder(32, layers=2, projection=24),
        tokenizer_2=tokenizer(),
    )
