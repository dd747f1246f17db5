"""Trains shapes-sd, the tiny Stable Diffusion bundled with DSD, from scratch on a CPU.

    python assets/train_shapes_sd.py

Four stages, each kept in --work_dir and skipped or resumed when the command is run again:

    vae    AutoencoderKL          32×32 pictures <-> 4×8×8 latents
    text   CLIPTextModel          learns to say which thing is where, then stays frozen (see `train_text`)
    pool                          the pictures' latents and the sentences' hidden states, computed once
    unet   UNet2DConditionModel   predicts the noise in latents from the text

and then the folder that `StableDiffusionPipeline.from_pretrained` loads is written. Only scenes of the split
"train" in the look "plain" are ever drawn here. Sizes and lengths are the constants below; the flags choose
only where things go.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_dsd.errors import DSDError
from diffusers_dsd.shapes import COLOURS, SHAPES, WORDS, Scene, all_scenes, draw

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "output" / "shapes-sd-work"  # ignored by git
SIZE = 32  # pixels; two more levels of the VAE halve it twice, to 8×8 latents
TOKENS = 16  # bos + at most 8 words + eos + padding
VAE_CYCLES, VAE_BATCH, VAE_RATE = (40_000, 24_000), 16, 2e-3  # pictures in each cycle of the rate
VAE_KL = 1e-5  # per latent element; at 2e-4 a channel died and corners were blurred
TEXT_STEPS, TEXT_BATCH, TEXT_RATE = 1_000, 64, 1e-3
POOL = 40_000  # pictures the UNet learns from, drawn and encoded once
UNET_SAMPLES, UNET_BATCH, UNET_RATE = 176_000, 32, 1e-3
EMPTY_SHARE = 0.1  # of captions left empty, so that the model also knows the noise without a text
EMA_DECAY = 0.998
MAX_WEIGHT = (30.0, 4.0)  # caps of the loss weight 1/ᾱ_t: first for the layout, then for the shapes
LAYOUT_SHARE = 0.36  # of the UNet's steps with the first cap
SAVE_EVERY = 500  # UNet steps between checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description="Train shapes-sd from scratch on a CPU and save it.")
    parser.add_argument("--output", type=Path, default=HERE / "shapes-sd", help="folder of the pipeline")
    parser.add_argument("--work_dir", type=Path, default=WORK, help="checkpoints; resumed from")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (two beside busy programs are slower)")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all", help="run up to here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for number, (name, stage) in enumerate(STAGES.items()):
        # Each stage has its own seed, so that skipping one does not change the next.
        torch.manual_seed(args.seed * len(STAGES) + number)
        random.seed(args.seed * len(STAGES) + number)
        with _timed(name, args.work_dir):
            stage(args.work_dir)
        if name == args.stage:
            return
    save(args.work_dir, args.output)


# ---------------------------------------------------------------- the parts


def make_vae() -> AutoencoderKL:
    """Stable Diffusion's VAE with three levels and no attention; a scaling factor of 1, see `_whiten`."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with one token for each word of the drawn world; other words go in pieces.

    The merges are learned as usual, the most frequent pair first, until each of the words is one token.
    """
    words = [(*word[:-1], f"{word[-1]}</w>") for word in WORDS]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_merge(word, best) for word in words]
    letters = _byte_letters()
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))},
        merges=merges,
        model_max_length=TOKENS,
    )


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _byte_letters() -> list[str]:
    """The 256 printable letters that byte-level tokenizers write bytes with, in the order of the bytes."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text encoder: 3 layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet with cross-attention at all three levels (8×8, 4×4, 2×2) and in the middle."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads: Diffusers' historical name for it
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# ---------------------------------------------------------------- pictures and sentences


def pictures(scenes: list[Scene], rng: random.Random) -> Tensor:
    """Drawings of the scenes: (N, 3, 32, 32) in [-1, 1]."""
    arrays = np.stack([np.asarray(draw(scene, rng, "plain", SIZE).image) for scene in scenes])  # (N, H, W, 3)
    # Contiguous: GroupNorm on a CPU is inaccurate on the transposed view.
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def wordings(scenes: list[Scene]) -> list[Scene]:
    """Both wordings of every scene."""
    return [wording for scene in scenes for wording in (scene, scene.mirrored)]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids as Stable Diffusion's pipeline makes them: (N, 16)."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


# ---------------------------------------------------------------- stages


def train_vae(work_dir: Path) -> None:
    """Reconstruct pictures and whiten the latents, in cycles of the learning rate."""
    if (work_dir / "vae.pt").exists():
        return
    vae, scenes, seed = make_vae(), all_scenes("train"), torch.initial_seed()
    nn.init.constant_(vae.quant_conv.bias[4:], -6.0)  # log variances: start with little noise, or channels die
    for cycle, samples in enumerate(VAE_CYCLES, 1):
        torch.manual_seed(seed + 1000 * cycle)
        rng, steps, done = random.Random(seed + 1000 * cycle), samples // VAE_BATCH, work_dir / f"vae-{cycle}.pt"
        if done.exists():
            vae.load_state_dict(torch.load(done, weights_only=True))
            continue
        vae.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
        shown = 0.0
        for step in range(steps):
            _set_rate(optimizer, VAE_RATE, step, steps)
            x = pictures(rng.choices(scenes, k=VAE_BATCH), rng)  # (B, 3, 32, 32)
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample - x
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = error.square().mean() + 0.2 * error.abs().mean() + VAE_KL * kl
            _update(optimizer, vae, loss)
            shown += error.square().mean().item() / 100
            if step % 100 == 99:
                print(f"vae {cycle} {step + 1:5d}/{steps}  squared error {shown:.5f}  KL {kl:.3f}", flush=True)
                shown = 0.0
        vae.eval().requires_grad_(False)
        _whiten(vae, pictures(rng.choices(scenes, k=2000), rng))
        _write(done, vae.state_dict())
    _write(work_dir / "vae.pt", vae.state_dict())


def _whiten(vae: AutoencoderKL, x: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1 on the pictures `x`, by the two 1×1 convolutions."""
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(200)])  # (N, 4, 8, 8)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))  # (4,), (4,)
    into, out = vae.quant_conv, vae.post_quant_conv  # 8 → 8 (means, log variances) and 4 → 4 channels
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()
    print(f"vae latents had mean {mean.tolist()} and deviation {std.tolist()}: now 0 and 1", flush=True)


class Probe(nn.Module):
    """What a sentence says, read from one hidden state: colour and shape of the left or upper thing, of the
    right or lower thing, and the axis."""

    SIZES = (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), 2)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, sum(self.SIZES))

    def forward(self, states: Tensor) -> list[Tensor]:
        """(B, L, 128) to five tensors of logits (B, L, classes)."""
        return list(self.linear(states).split(self.SIZES, dim=-1))

    @staticmethod
    def answers(scene: Scene) -> list[int]:
        lead, other = scene.canonical.first, scene.canonical.second
        things = [index for t in (lead, other) for index in (COLOURS.index(t.colour), SHAPES.index(t.shape))]
        return [*things, int(scene.canonical.relation == "above")]


def train_text(work_dir: Path) -> None:
    """Teach the text encoder which thing is where, in every hidden state from the end token on.

    Stable Diffusion's text encoder is pre-trained (CLIP). Learned along with the UNet instead, it never gets
    to tell "left of" from "right of": the noise loss rewards the layout too little.
    """
    tokenizer = make_tokenizer()
    if (work_dir / "text.pt").exists():
        return
    encoder, probe = make_text_encoder(tokenizer), Probe()
    scenes = {split: wordings(all_scenes(split)) for split in ("train", "test")}
    ids = {split: tokenize(tokenizer, [scene.sentence for scene in scenes[split]]) for split in scenes}
    answers = {split: torch.tensor([probe.answers(scene) for scene in scenes[split]]) for split in scenes}

    def logits(split: str, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits (M, classes) at the M end and padding tokens of sentences, and the row of each, (M,)."""
        tokens = ids[split][rows]
        states = encoder(tokens).last_hidden_state  # (B, 16, 128)
        ends = tokens == tokenizer.eos_token_id  # the padding token is the end token
        return probe(states[ends]), rows[ends.nonzero()[:, 0]]

    parts = nn.ModuleList([encoder, probe])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=TEXT_RATE, weight_decay=1e-2)
    for step in range(TEXT_STEPS):
        _set_rate(optimizer, TEXT_RATE, step, TEXT_STEPS)
        guesses, rows = logits("train", torch.randint(len(scenes["train"]), (TEXT_BATCH,)))
        truths = answers["train"][rows].unbind(1)
        loss = sum(F.cross_entropy(guess, truth) for guess, truth in zip(guesses, truths, strict=True))
        _update(optimizer, parts, loss)
        if step % 300 == 0 or step == TEXT_STEPS - 1:
            with torch.no_grad():
                guesses, rows = logits("test", torch.arange(len(scenes["test"])))
            right = torch.stack([guess.argmax(-1) for guess in guesses], 1) == answers["test"][rows]
            shares = " ".join(f"{share:.3f}" for share in right.float().mean(0).tolist())
            print(
                f"text {step:5d}/{TEXT_STEPS}  loss {loss:.4f}  held out {shares}",
                flush=True,
            )
    _write(work_dir / "text.pt", encoder.state_dict())


@torch.no_grad()
def make_pool(work_dir: Path) -> None:
    """Draw the UNet's pictures and keep their latents, and the hidden states of every sentence."""
    if (work_dir / "pool.pt").exists():
        return
    vae, tokenizer = _load(make_vae(), work_dir / "vae.pt"), make_tokenizer()
    encoder = _load(make_text_encoder(tokenizer), work_dir / "text.pt")
    rng, scenes = random.Random(random.random()), all_scenes("train")
    which = [i % len(scenes) for i in range(POOL)]  # every scene equally often
    latents = []
    for start in range(0, POOL, 250):
        x = pictures([scenes[i] for i in which[start : start + 250]], rng)
        latents.append(vae.encode(x).latent_dist.mean)  # (250, 4, 8, 8)
    texts = ["", *(scene.sentence for scene in wordings(scenes))]  # a scene's wordings are rows 2i+1 and 2i+2
    states = [encoder(part).last_hidden_state for part in tokenize(tokenizer, texts).split(256)]
    _write(
        work_dir / "pool.pt",
        {"z": torch.cat(latents), "scene": torch.tensor(which), "states": torch.cat(states)},
    )


def train_unet(work_dir: Path) -> None:
    """Predict the noise in latents, weighted by 1/ᾱ_t up to a cap.

    The layout is decided at high noise, where guessing the noise itself is easy and a plain loss hardly looks;
    with this weight the loss is that of v-prediction, up to its cap. Once the layout is learned (a third of the
    time), a lower cap turns to the middle noise levels, where shapes are decided.
    """
    if (work_dir / "unet.pt").exists():
        return
    pool = torch.load(work_dir / "pool.pt", weights_only=True)
    alpha_bar = make_scheduler().alphas_cumprod  # (1000,)
    unet = make_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=UNET_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    average = {name: value.clone() for name, value in unet.state_dict().items()}
    state, first, steps = work_dir / "unet-state.pt", 0, UNET_SAMPLES // UNET_BATCH
    if state.exists():
        saved = torch.load(state, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        average, first = saved["average"], saved["step"]
    shown = 0.0
    for step in range(first, steps):
        _set_rate(optimizer, UNET_RATE, step, steps)
        rows = torch.randint(POOL, (UNET_BATCH,))
        text = 1 + 2 * pool["scene"][rows] + torch.randint(2, (UNET_BATCH,))  # either wording
        text[torch.rand(UNET_BATCH) < EMPTY_SHARE] = 0
        # Stratified: one timestep from each of B equal slices of 0 … 999.
        t = ((torch.arange(UNET_BATCH) + torch.rand(UNET_BATCH)) * (1000 / UNET_BATCH)).long()
        noise = torch.randn(UNET_BATCH, 4, 8, 8)
        a = alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        z = a.sqrt() * pool["z"][rows] + (1 - a).sqrt() * noise
        error = (unet(z, t, pool["states"][text]).sample - noise).square().mean((1, 2, 3))  # (B,)
        cap = MAX_WEIGHT[step >= LAYOUT_SHARE * steps]
        loss = (error * (1 / alpha_bar[t]).clamp(max=cap)).mean()
        _update(optimizer, unet, loss)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(unet.state_dict().values()), 1 - decay)
        shown += error.mean().item() / 100
        if step % 100 == 99:
            print(f"unet {step + 1:5d}/{steps}  error {shown:.4f}  weighted {loss:.4f}", flush=True)
            shown = 0.0
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            checkpoint = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            _write(state, checkpoint | {"rng": torch.get_rng_state(), "step": step + 1})
    _write(work_dir / "unet.pt", average)


STAGES: dict[str, Callable[[Path], None]] = {
    "vae": train_vae,
    "text": train_text,
    "pool": make_pool,
    "unet": train_unet,
}


def save(work_dir: Path, output: Path) -> None:
    """Write the pipeline in float16; `output` is replaced only once the new one is complete."""
    tokenizer = make_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=_load(make_vae(), work_dir / "vae.pt"),
        text_encoder=_load(make_text_encoder(tokenizer), work_dir / "text.pt"),
        tokenizer=tokenizer,
        unet=_load(make_unet(), work_dir / "unet.pt"),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16)
    new, old = (output.with_name(f".{output.name}-{word}") for word in ("new", "old"))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(new)
    _write_old_tokenizer_files(tokenizer, new / "tokenizer")
    times = work_dir / "times.json"
    if output.exists():
        for kept in output.glob("*.md"):  # the model card is written by hand
            shutil.copy(kept, new)
        output.rename(old)
    new.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in json.loads(times.read_text()).items())
    print(f"Saved {output} ({size:.1f} MB). Minutes: {minutes}.")


def _write_old_tokenizer_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: what transformers before 5 reads."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))


# ---------------------------------------------------------------- helpers


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """100 steps of warm-up, then half a cosine down to 1 % of the peak."""
    rate = min((step + 1) / 100, 0.505 + 0.495 * math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * rate


def _update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _write(path: Path, value: object) -> None:
    """Save so that an interruption leaves the old file or the new one, never half of one."""
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _load(model: nn.Module, path: Path) -> nn.Module:
    if not path.exists():
        raise DSDError(f"{path} is missing: run the earlier stages first (--stage all).")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


@contextmanager
def _timed(name: str, work_dir: Path) -> Iterator[None]:
    """Add the seconds a stage takes to times.json, also when it is interrupted."""
    path, start = work_dir / "times.json", time.perf_counter()
    try:
        yield
    finally:
        times = json.loads(path.read_text()) if path.exists() else {}
        times[name] = round(times.get(name, 0) + time.perf_counter() - start, 1)
        path.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
