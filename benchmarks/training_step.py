"""What a training step costs for each row of a UNet call, on the architecture of Stable Diffusion 2.1-base.

    python -m benchmarks.training_step --dtype bfloat16

Counts floating-point operations, and the bytes that autograd saves for a row that carries gradient, on a randomly
initialised UNet with rank-4 attention prompts; the counts do not depend on the machine. Needs about 10 GiB of memory.
"""

import argparse
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dsd.attention import read_attention
from diffusers_dsd.prompts import add_attention_prompts

SD_2_1_BASE = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}


def kept_bytes(unet: UNet2DConditionModel, step: Callable[[], object]) -> int:
    """Most bytes of distinct tensors, other than the UNet's weights, that autograd holds during a step."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # holds the tensors, so that no address is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(size for size, _ in kept.values())


def gigaflops() -> tuple[float, float]:
    """GFLOP of one row forward, and backward; on the meta device, where nothing is computed."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_2_1_BASE)
    add_attention_prompts(unet, rank=4, seed=0)
    unet.to("meta")
    with FlopCounterMode(display=False) as counter:
        objective = score(unet, rows=1)
        forward = counter.get_total_flops() / 1e9
        objective.backward()
    return forward, counter.get_total_flops() / 1e9 - forward


def score(unet: UNet2DConditionModel, rows: int) -> torch.Tensor:
    """A sum of both readings that a training step takes of `rows` random rows."""
    size, dtype, device = unet.config.sample_size, unet.dtype, unet.device
    noisy = torch.randn(rows, 4, size, size, dtype=dtype, device=device)
    text = torch.randn(rows, 77, unet.config.cross_attention_dim, dtype=dtype, device=device)
    with read_attention(unet) as reader:
        output = unet(noisy, torch.tensor(500, device=device), text).sample
        return reader.mean().sum() + output.float().norm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="(default: bfloat16)")
    args = parser.parse_args()
    forward, backward = gigaflops()
    print(f"GFLOP per row: {forward:.0f} forward, {backward:.0f} backward")
    unet = UNet2DConditionModel(**SD_2_1_BASE).to(getattr(torch, args.dtype))
    trainable = add_attention_prompts(unet, rank=4, seed=0)
    print(f"UNet: {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} million weights, {args.dtype}")
    print(f"attention prompts: {sum(p.numel() for p in trainable) / 1e6:.2f} million weights, float32")
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        per_row = kept_bytes(unet, lambda: score(unet, rows=1))
        name = "with --gradient_checkpointing" if checkpointing else "without --gradient_checkpointing"
        print(f"saved per row with gradient, {name}: {per_row / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
