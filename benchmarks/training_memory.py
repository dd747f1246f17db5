"""What a training step keeps for its backward pass, on the architecture of Stable Diffusion 2.1-base.

    python benchmarks/training_memory.py --dtype bfloat16

Counts the bytes that autograd saves for each row that carries gradient, on a randomly initialised UNet with rank-4
attention prompts; the count does not depend on the machine. Needs about 10 GiB of memory.
"""

import argparse

import torch
from diffusers import UNet2DConditionModel

from diffusers_dsd.attention import read_attention
from diffusers_dsd.prompts import add_attention_prompts

SD_2_1_BASE = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}


def saved_bytes(unet: UNet2DConditionModel, rows: int) -> int:
    """Bytes of distinct tensors, other than weights, that a forward pass of `rows` rows saves for the backward pass."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # holds the tensors, so that no address is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    config, dtype = unet.config, unet.dtype
    noisy = torch.randn(rows, 4, config.sample_size, config.sample_size, dtype=dtype)
    text = torch.randn(rows, 77, config.cross_attention_dim, dtype=dtype)
    with read_attention(unet) as reader, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(noisy, torch.tensor(500), text).sample
        (reader.mean().sum() + output.float().norm()).detach()
    return sum(size for size, _ in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="(default: bfloat16)")
    args = parser.parse_args()
    unet = UNet2DConditionModel(**SD_2_1_BASE).to(getattr(torch, args.dtype))
    trainable = add_attention_prompts(unet, rank=4, seed=0)
    print(f"UNet: {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} million weights, {args.dtype}")
    print(f"attention prompts: {sum(p.numel() for p in trainable) / 1e6:.2f} million weights, float32")
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        per_row = saved_bytes(unet, rows=1)
        name = "with --gradient_checkpointing" if checkpointing else "without --gradient_checkpointing"
        print(f"saved per row with gradient, {name}: {per_row / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
