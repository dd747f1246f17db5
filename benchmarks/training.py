"""A training step in two passes against backpropagation through all candidates, in one run.

    python -m benchmarks.training                      # shapes-sd, items of 1 image and 10 texts
    python -m benchmarks.training --model 2.1-base --repeats 2
    python -m benchmarks.training --device cuda

Three ways to the same gradient: the published one (every candidate with its own VAE pass and empty-text row, attention
as a matrix in memory, everything kept for the backward pass), one pass over all candidates with DSD's shared rows, and
DSD's two passes. Time is that of the whole step; memory is what autograd keeps at most, counted in bytes. Keeping all
candidates of 2.1-base takes more memory than most machines have, so there the published way is measured on one
candidate and multiplied, and the one pass is left out.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from PIL import Image

from benchmarks.plain import plain_terms
from benchmarks.scoring import DTYPES, make_pipeline, timed
from benchmarks.training_step import kept_bytes
from diffusers_dsd import DSDPipeline
from diffusers_dsd.attention import read_attention
from diffusers_dsd.prompts import add_attention_prompts
from diffusers_dsd.scoring import EMPTY, Draws, measure
from diffusers_dsd.shapes import shapes_item
from diffusers_dsd.training import Example, draw_timestep_and_noise, hinge_step

MARGIN = 10.0  # never met, so that every step has a gradient


class Step:
    """One item of 1 image and n texts, at one timestep."""

    def __init__(self, pipe: DSDPipeline, score: str, number: int = 0) -> None:
        self.pipe, self.score = pipe, score
        item = shapes_item("text", number, size=128)
        self.image: Image.Image = item.images[0]
        self.texts, self.label = item.texts, item.label
        size = pipe.resolution // pipe.vae_scale_factor
        self.timestep, self.noise = draw_timestep_and_noise(0, 0, (pipe.vae.config.latent_channels, size, size))

    def published(self) -> None:
        """Every candidate by itself, with gradient."""
        self._hinge(torch.stack([self._plain_score(text) for text in self.texts])).backward()

    def published_candidate(self) -> None:
        """One candidate of that; all cost the same."""
        self._plain_score(self.texts[0]).backward()

    def one_pass(self) -> None:
        """All rows at once, the empty text's shared, with gradient."""
        latents, prompts, draws = self._encoded()
        rows = [(0, text, 0) for text in ([] if self.score == "attention" else [EMPTY])]
        rows += [(0, text, 0) for text in range(len(self.texts))]
        with read_attention(self.pipe.unet, attention_only=self.score == "attention") as reader:
            layers, error = measure(self.pipe.denoiser, reader, latents, prompts, draws, rows)
            scores = layers.mean(1)
            if error is not None:
                scores = (scores + error[0] - error)[1:]
            self._hinge(scores).backward()

    def two_passes(self) -> None:
        """DSD's step."""
        latents, prompts, draws = self._encoded()
        example = Example([(0, text, 0) for text in range(len(self.texts))], self.label)
        how = (self.score, "cond", MARGIN, 1.0, torch.Tensor.backward, 16)
        hinge_step(self.pipe.denoiser, latents, prompts, [example], draws, *how)

    def _plain_score(self, text: str) -> torch.Tensor:
        return plain_terms(self.pipe, self.image, text, self.timestep, self.noise).score(self.score, "cond")

    def _encoded(self):  # noqa: ANN202 - latents, prompts, draws
        draws = Draws(torch.tensor([self.timestep]), self.noise[None])
        device = self.pipe.unet.device
        draws = Draws(draws.timesteps.to(device), draws.noise.to(device))
        return self.pipe.encode_images([self.image]), self.pipe.encode_texts(self.texts), draws

    def _hinge(self, scores: torch.Tensor) -> torch.Tensor:
        wrong = [place for place in range(len(scores)) if place != self.label]
        return torch.relu(MARGIN + scores[wrong].max() - scores[self.label])


def gradients(pipe: DSDPipeline, step: Callable[[], None]) -> list[torch.Tensor]:
    pipe.unet.zero_grad()
    step()
    return [p.grad.clone() for p in pipe.unet.parameters() if p.requires_grad and p.grad is not None]


def check_gradients(pipe: DSDPipeline, ways: dict[str, Callable[[], None]], exact: bool) -> None:
    """All ways give the published gradient; warms them up, too."""
    found = {name: gradients(pipe, way) for name, way in ways.items()}
    published = found.pop("published")
    norm = torch.stack([g.norm() for g in published]).norm()
    for name, ours in found.items():
        if len(ours) == len(published):
            apart = torch.stack([(a - b).norm() for a, b in zip(ours, published, strict=True)]).norm() / norm
            assert apart < 1e-3 or not exact, f"{name}: another gradient ({apart:.1e})"


def compare(pipe: DSDPipeline, score: str, args: argparse.Namespace) -> None:
    """Prints the lines of a score."""
    step, factors = Step(pipe, score), {}
    ways = {"published": step.published, "one pass": step.one_pass, "two passes": step.two_passes}
    if args.model == "2.1-base":
        ways = {"published": step.published_candidate, "two passes": step.two_passes}
        factors = {"published": len(step.texts)}
    else:
        check_gradients(pipe, ways, exact=args.dtype == "float32")
    memory = {name: kept_bytes(pipe.unet, way) * factors.get(name, 1) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            times[name].append(timed(way, args.device) * factors.get(name, 1))
    ours, ours_kept = statistics.median(times["two passes"]), memory["two passes"]
    for name in ways:
        seconds = statistics.median(times[name])
        print(
            f"| {score} | {name} | {seconds:.3g} | {seconds / ours:.1f} × faster | {memory[name] / 2**20:,.0f} MiB "
            f"| {ours_kept / memory[name]:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["shapes-sd", "2.1-base"], default="shapes-sd", help="(default: shapes-sd)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=list(DTYPES), default="float32", help="(default: float32)")
    add("--repeats", type=int, default=7, help="(default: 7)")
    args = parser.parse_args()
    pipe = make_pipeline(args.model, DTYPES[args.dtype], args.device)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    for weight in add_attention_prompts(pipe.unet, rank=4, seed=0):
        torch.nn.init.normal_(weight, std=0.1)
    print(f"{args.model}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, 10 candidates\n")
    print("| score | way | seconds a step | two passes are | kept for backward | of it two passes keep |")
    print("|---|---|---|---|---|---|")
    for score in ("hybrid", "attention"):
        compare(pipe, score, args)


if __name__ == "__main__":
    main()
