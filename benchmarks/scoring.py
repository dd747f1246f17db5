"""DSD's scoring against the published procedure (plain.py), in one run.

    python -m benchmarks.scoring --model shapes-sd
    python -m benchmarks.scoring --model 2.1-base                  # its architecture, randomly initialised
    python -m benchmarks.scoring --model 2.1-base --device cuda --dtype float16 --batchsize auto --compile

For each workload the two alternate, and the medians of their times are compared. The published procedure costs the same
for every pair and timestep, so it is timed on one of them and multiplied; ours has a part that is paid once per item
(VAE and text encoder) and a part per timestep, which are timed apart. The ratio is given at the timesteps of --grid.
Floating-point operations are counted by torch.utils.flop_counter; peak memory is that of a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.plain import plain_score
from benchmarks.training_step import SD_2_1_BASE
from diffusers_dsd import DSDPipeline
from diffusers_dsd.attention import PATHS
from diffusers_dsd.batching import auto_batch_size
from diffusers_dsd.models import SHAPES_SD, compile_blocks
from diffusers_dsd.prepared import PreparedItems, seeded_noise
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.shapes import shapes_item

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """Images × texts, and the score."""

    name: str
    images: int
    texts: int
    score: str
    paths: tuple[str, ...] = PATHS


WORKLOADS = [
    Workload("ComVG-shaped (2 images × 1 text), hybrid", 2, 1, "hybrid"),
    Workload("ComVG-shaped (2 images × 1 text), attention", 2, 1, "attention"),
    Workload("RefCOCOg-shaped (1 image × 10 texts), hybrid", 1, 10, "hybrid"),
    Workload("RefCOCOg-shaped (1 image × 10 texts), attention", 1, 10, "attention"),
    Workload("RefCOCOg-shaped, attention, --layers down,mid", 1, 10, "attention", ("down", "mid")),
    Workload("32 × 32 matrix, hybrid", 32, 32, "hybrid"),
    Workload("32 × 32 matrix, attention", 32, 32, "attention"),
]


def make_pipeline(model: str, dtype: torch.dtype, device: str) -> DSDPipeline:
    """shapes-sd, or the architecture of Stable Diffusion 2.1-base with random weights."""
    if model == "shapes-sd":
        pipe = DSDPipeline.from_pretrained(SHAPES_SD, dtype=dtype)
    else:
        torch.manual_seed(0)
        text = CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        )
        pipe = DSDPipeline(
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=CLIPTokenizer.from_pretrained(SHAPES_SD / "tokenizer"),
            unet=UNet2DConditionModel(**SD_2_1_BASE),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
        )
        pipe.tokenizer.model_max_length = 77
    pipe.to(device, dtype)
    if device == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(workload: Workload) -> tuple[list[Image.Image], list[str]]:
    """Drawn scenes and sentences, all different."""
    scenes = [shapes_item("text", number, size=128) for number in range(max(workload.images, workload.texts))]
    images = [scene.images[0] for scene in scenes[: workload.images]]
    return images, [scene.texts[scene.label] for scene in scenes[: workload.texts]]


def timed(step: Callable[[], object], device: str) -> float:
    """Seconds."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(step: Callable[[], object]) -> float:
    """GFLOP."""
    # torch knows what attention costs in its kernels for GPUs, and takes the CPU's for nothing
    uncounted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        step()
    return counter.get_total_flops() / 1e9


def _attention_flops(query: tuple, key: tuple, value: tuple, *_: object, out_shape: object = None, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


class Contest:
    """Both ways to score one workload, cut into their repeating parts."""

    def __init__(self, pipe: DSDPipeline, workload: Workload, batch_size: int, timesteps: int) -> None:
        self.pipe, self.workload, self.batch_size = pipe, workload, batch_size
        self.images, self.texts = inputs(workload)
        self.grid = timestep_grid(40)[:: 40 // timesteps][:timesteps]
        self.prepared: PreparedItems | None = None

    def plain_pair(self) -> float:
        """One pair at one timestep, the published way."""
        size = self.pipe.resolution // self.pipe.vae_scale_factor
        noise = seeded_noise(0, (self.grid[0],), (4, size, size))
        how = self.workload.score, "cond", self.workload.paths
        return plain_score(self.pipe, self.images[0], self.texts[0], self.grid[:1], noise, *how)

    def prepare(self) -> None:
        """Our part that is paid once."""
        items = [(self.images, self.texts)]
        self.prepared = PreparedItems(self.pipe, items, self.batch_size, paths=self.workload.paths)

    def ours(self) -> torch.Tensor:
        """Our part for the timesteps."""
        assert self.prepared is not None
        return self.prepared.score(self.prepared.pairs[0], self.grid, self.workload.score).total()[0]

    def check(self, tolerance: float) -> None:
        """The two give the same score."""
        ours, plain = float(self.ours()[0]), self.plain_pair()
        if not abs(ours - plain) <= tolerance * max(1.0, abs(plain)):
            raise SystemExit(f"{self.workload.name}: {ours} and {plain} are not the same score")


def measure(contest: Contest, repeats: int, grid: int, device: str, tolerance: float) -> list[str]:
    """A line of the table."""
    pairs = contest.workload.images * contest.workload.texts
    contest.prepare()
    contest.check(tolerance)  # warms both up
    times: dict[str, list[float]] = {"plain": [], "prepare": [], "ours": []}
    for _ in range(repeats):
        times["plain"].append(timed(contest.plain_pair, device) * pairs)
        times["prepare"].append(timed(contest.prepare, device))
        times["ours"].append(timed(contest.ours, device) / len(contest.grid))
    plain, once, step = (statistics.median(times[part]) for part in ("plain", "prepare", "ours"))
    work = flops(contest.plain_pair) * pairs
    our_work = flops(contest.prepare) / grid + flops(contest.ours) / len(contest.grid)
    ours = once / grid + step
    spread = [p / (o / grid + s) for p, o, s in zip(times["plain"], times["prepare"], times["ours"], strict=True)]
    return [
        contest.workload.name,
        f"{plain:.3g} s",
        f"{ours:.3g} s",
        f"**{plain / ours:.1f} ×** ({min(spread):.1f} - {max(spread):.1f})",
        f"{work:,.1f}",
        f"{our_work:,.1f}",
        f"{work / our_work:.1f} ×",
        f"{our_work / ours / 1000:.2f}",
    ]


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square matrix product: what the machine can do."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(5))
    return 2 * n**3 / best / 1e12


def peak_memory(args: argparse.Namespace) -> dict[str, float]:
    """GiB of a process that scores one RefCOCOg-shaped item at one timestep, for either way."""
    peaks = {}
    for way in ("plain", "ours"):
        command = [sys.executable, "-m", "benchmarks.scoring", "--model", args.model, "--dtype", args.dtype]
        command += ["--device", args.device, "--batchsize", args.batchsize, "--peak_of", way]
        root = Path(__file__).resolve().parent.parent
        peaks[way] = float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
    return peaks


def peak_of(contest: Contest, way: str, device: str) -> float:
    """GiB that this process had at most while it scored (weights included)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of making the model
    contest.plain_pair() if way == "plain" else (contest.prepare(), contest.ours())
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["shapes-sd", "2.1-base"], default="shapes-sd", help="(default: shapes-sd)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=list(DTYPES), default="float32", help="(default: float32)")
    add("--batchsize", default="auto", help="rows of our UNet calls (default: auto)")
    add("--repeats", type=int, default=3, help="times each workload is measured (default: 3)")
    add("--timesteps", type=int, default=1, help="that ours is measured on (default: 1)")
    add("--grid", type=int, default=40, help="timesteps over which the part paid once is spread (default: 40)")
    add("--workloads", type=int, nargs="*", help="numbers from 1 (default: all; without the matrices for 2.1-base)")
    add("--compile", action="store_true", help="compile our transformer blocks")
    add("--peak_of", choices=["plain", "ours"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    pipe = make_pipeline(args.model, DTYPES[args.dtype], args.device)
    batch_size = auto_batch_size(pipe) if args.batchsize == "auto" else int(args.batchsize)
    if args.peak_of:
        print(peak_of(Contest(pipe, WORKLOADS[2], batch_size, 1), args.peak_of, args.device))
        return
    if args.compile:
        compile_blocks(pipe.unet)
    numbers = args.workloads or range(1, len(WORKLOADS) + 1 if args.model == "shapes-sd" else 6)
    rate = matmul_rate(DTYPES[args.dtype], args.device)
    print(f"{args.model}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, batches of {batch_size}")
    print(f"matrix products: {rate:.3g} TFLOP/s\n")
    print("| workload | published, per timestep | ours | ratio (lowest - highest) | GFLOP | ours | ratio | TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    tolerance = 1e-4 if args.dtype == "float32" else 0.05
    for number in numbers:
        contest = Contest(pipe, WORKLOADS[number - 1], batch_size, args.timesteps)
        line = measure(contest, args.repeats, args.grid, args.device, tolerance)
        print("| " + " | ".join(line) + " |", flush=True)
    peaks = peak_memory(args)
    print(f"\npeak memory: published {peaks['plain']:.2f} GiB, ours {peaks['ours']:.2f} GiB")


if __name__ == "__main__":
    main()
