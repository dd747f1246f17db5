"""Learns attention prompts for a diffusion model from few examples, so that it matches images and texts better.

    accelerate launch dsd_train.py --pretrained_model_name_or_path shapes-sd --train_data Shapes --output_dir output

Freezes the model, adds low-rank updates to every attention of its UNet, and teaches them with a hinge loss to score
the right pair above the hardest wrong one. Checkpoints load in dsd_infer.py (`--output_dir CHECKPOINT`), in
DSDPipeline and in any Diffusers pipeline.
"""

import argparse
import functools
import importlib.util
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of optional packages that no score needs

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.optimization import get_scheduler
from diffusers.utils.logging import disable_progress_bar
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer

from custom_datasets import BENCHMARKS, Item, MatchingDataset, get_dataset
from diffusers_dsd import DSDError, DSDPipeline
from diffusers_dsd.checkpoints import (
    BEST_NAME,
    checkpoints_in,
    find_checkpoint,
    finish_replacing,
    load_state,
    remove_oldest,
    save_checkpoint,
)
from diffusers_dsd.cli import (
    ends_in_a_sentence,
    in_every_process,
    make_accelerator,
)
from diffusers_dsd.evaluation import evaluate
from diffusers_dsd.hub import model_card, push_to_hub
from diffusers_dsd.images import to_tensor
from diffusers_dsd.item_records import ScoreSettings
from diffusers_dsd.metrics import MAIN_FIGURE, Figure, format_table
from diffusers_dsd.models import load_pipeline
from diffusers_dsd.prompts import (
    add_attention_prompts,
    attention_prompts_of,
    check_prompts_fit,
    read_attention_prompts,
    set_attention_prompts,
)
from diffusers_dsd.results import versions, write_text
from diffusers_dsd.schedule import timestep_grid
from diffusers_dsd.scoring import Draws
from diffusers_dsd.training import Example, StepOutcome, draw_timestep_and_noise, hinge_step
from diffusers_dsd.training_data import Part, examples_of
from diffusers_dsd.training_flags import TRACKERS, parse_training_flags
from diffusers_dsd.weighting import fit_attention_weight

ROOT = Path(__file__).resolve().parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    trainable = [name for name, benchmark in BENCHMARKS.items() if "train" in benchmark.modes]
    return parse_training_flags(__doc__ or "", trainable, ROOT.parent, argv)


def main() -> None:
    args = parse_args()
    with ends_in_a_sentence("dsd_train.py"):
        check_packages(args)
        if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
            raise DSDError("--mixed_precision fp16 needs a GPU: use bf16 or no.")
        options = {"mixed_precision": args.mixed_precision, "project_dir": args.output_dir / args.logging_dir}
        accelerator = make_accelerator(log_with=None if args.report_to == "none" else args.report_to, **options)
        Training(args, accelerator).run()


class Training:
    """One run of the script: the parts it is made of, and the loop over optimizer steps."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.stop_signal: int | None = None
        in_every_process(accelerator, self.build)

    # ---- building the parts

    def build(self) -> None:
        args = self.args
        timestep_grid(args.sampling_time_steps)
        self.train_items(resize=32)  # a missing file should not wait for gigabytes of weights
        if args.val_data:
            get_dataset(args.val_data, args.data_root, seed=args.seed)
        make_writable(args.output_dir)
        finish_replacing(args.output_dir)
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.pipe = self.load_model()
        self.weights = add_attention_prompts(self.pipe.unet, args.rank, args.seed)
        if args.gradient_checkpointing:
            self.pipe.unet.enable_gradient_checkpointing()
        self.denoiser = self.pipe.denoiser
        size = self.pipe.resolution
        self.latent_shape = (self.pipe.vae.config.latent_channels, *(2 * [size // self.pipe.vae_scale_factor]))
        self.items = self.train_items(size, transform=functools.partial(to_tensor, resolution=size))
        self.held_out, self.val_data = self.validation_items(size)
        self.count = min(len(self.items), args.max_train_samples or len(self.items)) - args.fit_attention_weight
        if args.use_validation_split:
            self.count -= args.val_num
        if self.count < 1:
            kept = "--val_num" if args.use_validation_split else "--fit_attention_weight"
            raise DSDError(f"{kept} leaves no item to train on: choose a smaller number.")
        self.per_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        self.steps_per_epoch = math.ceil(self.count / self.per_step)
        self.total_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        rate = args.learning_rate * (self.per_step if args.scale_lr else 1)
        self.optimizer = self.accelerator.prepare(self.make_optimizer(rate))
        self.schedule = get_scheduler(
            args.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.step, self.best, self.attention_weight = 0, -math.inf, 1.0
        self.figures: dict[str, dict[str, Figure]] = {}
        if args.resume_from_checkpoint:
            self.resume()
        elif checkpoints_in(args.output_dir, args.train_data):
            raise DSDError(
                f"--output_dir {args.output_dir} holds checkpoints of an earlier training: go on with "
                f"--resume_from_checkpoint latest, or choose another folder."
            )

    def train_items(self, resize: int, transform: Any = None) -> MatchingDataset:
        args = self.args
        return get_dataset(args.train_data, args.data_root, transform, resize, mode="train", seed=args.seed)

    def validation_items(self, size: int) -> tuple[Any, MatchingDataset | None]:
        """The items of --validation, and the benchmark that is evaluated at the end."""
        args = self.args
        val_data = get_dataset(args.val_data, args.data_root, resize=size, seed=args.seed) if args.val_data else None
        if not args.use_validation_split:
            return val_data, val_data
        items = self.train_items(size)
        end = min(len(items), args.max_train_samples or len(items))
        return Part(items, range(max(0, end - args.val_num), end)), val_data

    def load_model(self) -> DSDPipeline:
        args, accelerator = self.args, self.accelerator
        if not accelerator.is_main_process:
            disable_progress_bar()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        pipe = load_pipeline(args.model, dtype, args.revision, args.cache_dir)
        if args.tokenizer:
            pipe.register_modules(tokenizer=read_tokenizer(args.tokenizer))
        if args.prediction_type:
            pipe.scheduler.register_to_config(prediction_type=args.prediction_type)
        if args.resolution:
            pipe.resolution = args.resolution
        pipe.to(accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make_optimizer(self, rate: float) -> torch.optim.Optimizer:
        args = self.args
        kind: Any = torch.optim.AdamW
        if args.use_8bit_adam:
            kind = importlib.import_module("bitsandbytes").optim.AdamW8bit
        betas = (args.adam_beta1, args.adam_beta2)
        return kind(self.weights, lr=rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)

    # ---- the loop

    def run(self) -> None:
        args, accelerator = self.args, self.accelerator
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)
        in_every_process(accelerator, self.start_trackers)
        self.pipe.unet.train()
        items = self.batches()
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not accelerator.is_main_process,
            desc=args.train_data,
        )
        with bar:
            while self.step < self.total_steps:
                outcome = self.optimizer_step(next(items))
                if accelerator.is_main_process:
                    rate = self.schedule.get_last_lr()[0]
                    figures = {
                        "loss": outcome.loss / outcome.examples,
                        "satisfied": outcome.satisfied / outcome.examples,
                        "learning_rate": rate,
                    }
                    bar.set_postfix_str(
                        f"loss {figures['loss']:.4f}, margin satisfied {figures['satisfied']:.2f}, lr {rate:.1e}"
                    )
                    accelerator.log(figures, step=self.step)
                bar.update()
                if self.stop_requested:
                    self.save(f"{args.train_data}-checkpoint-{self.step}")
                    number = self.stop_signal or signal.SIGTERM
                    if accelerator.is_main_process:
                        print(
                            f"\ndsd_train.py: {signal.Signals(number).name} after step {self.step}; everything is "
                            f"saved, go on with --resume_from_checkpoint latest.",
                            file=sys.stderr,
                        )
                    raise SystemExit(128 + number)
                if self.step % args.checkpointing_steps == 0:
                    self.save(f"{args.train_data}-checkpoint-{self.step}")
                    if args.validation and self.step % (args.checkpointing_steps * args.validation_epochs) == 0:
                        self.validate()
        self.finish()

    def batches(self) -> Iterator[list[list[Item]]]:
        """For each step from here on this process's items, in batches; a function of seed and step alone."""
        args, rank, world = self.args, self.accelerator.process_index, self.accelerator.num_processes
        plan = []
        for step in range(self.step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
            plan.append(order[position * self.per_step : (position + 1) * self.per_step][rank::world])
        loader = iter(
            DataLoader(
                self.items,
                sampler=[index for indices in plan for index in indices],
                batch_size=None,
                num_workers=args.dataloader_num_workers,
            )
        )
        for indices in plan:
            items = [next(loader) for _ in indices]
            size = args.train_batch_size
            yield [items[start : start + size] for start in range(0, len(items), size)]

    def optimizer_step(self, batches: list[list[Item]]) -> StepOutcome:
        """One step on this process's batches, with the gradient of all processes; what it gave, over all of them.

        Raises:
            DSDError: the loss is not a finite number; the weights are as before.
        """
        position = self.step % self.steps_per_epoch
        in_step = min(self.per_step, self.count - position * self.per_step)  # the last step of an epoch may be short
        parts = [self.hinge(batch, place, in_step) for place, batch in enumerate(batches)]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        sums = [sum(getattr(part, name) for part in parts) for name in ("loss", "satisfied", "examples")]
        tail = torch.tensor([*sums, self.stop_signal is not None], dtype=torch.float32, device=self.accelerator.device)
        # One sum over processes carries everything, so that they all stop, or fail, at the same step.
        flat: Any = self.accelerator.reduce(torch.cat([*(g.flatten() for g in gradients), tail]), "sum")
        loss, satisfied, examples, stop = flat[-4:].tolist()
        if not math.isfinite(loss):
            self.fail_on(batches, parts)
        for weight, gradient in zip(self.weights, flat[:-4].split([w.numel() for w in self.weights]), strict=True):
            weight.grad = gradient.view_as(weight)
        self.accelerator.clip_grad_norm_(self.weights, self.args.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # float16's scaler skips steps whose gradient overflowed
            self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.stop_requested = stop > 0
        return StepOutcome(loss, int(satisfied), int(examples), [])

    def hinge(self, batch: list[Item], place: int, in_step: int) -> StepOutcome:
        """Adds the gradient of one batch, the `place`-th of this process in this step."""
        args, world = self.args, self.accelerator.num_processes
        images, texts, examples, drawn = [], [], [], []
        for number, item in enumerate(batch):
            # the item's number in the whole training, the same whatever the processes and batches
            nth = (place * args.train_batch_size + number) * world + self.accelerator.process_index
            nth += self.step * self.per_step
            first_draw = len(drawn)
            for example in examples_of(item):
                candidates = []
                for i, (image, text, _) in enumerate(example.candidates):
                    if i == 0 or args.independent_noise:
                        draw = nth * 1000 + len(drawn) - first_draw  # no item has more candidates than that
                        drawn.append(draw_timestep_and_noise(args.seed, draw, self.latent_shape, args.noise_offset))
                    candidates.append((len(images) + image, len(texts) + text, len(drawn) - 1))
                examples.append(Example(candidates, example.positive))
            images += item.images
            texts += item.texts
        device = self.accelerator.device
        return hinge_step(
            self.denoiser,
            self.pipe.encode_images(images),
            self.pipe.encode_texts(texts, args.val_batch_size),
            examples,
            Draws(
                torch.tensor([timestep for timestep, _ in drawn], device=device),
                torch.stack([noise for _, noise in drawn]).to(device),
            ),
            args.score,
            args.halves,
            args.margin,
            1 / in_step,
            self.accelerator.backward,
            args.val_batch_size,
        )

    def fail_on(self, batches: list[list[Item]], parts: list[StepOutcome]) -> None:
        mine = [item.id for b, part in zip(batches, parts, strict=True) if not math.isfinite(part.loss) for item in b]
        names = ", ".join(gather_object(mine))
        if not self.accelerator.is_main_process:
            raise SystemExit(1)
        raise DSDError(
            f"The loss of step {self.step + 1} is not a finite number (items {names} of {self.args.train_data}): "
            f"choose a smaller --learning_rate, or bf16 for fp16, and go on with --resume_from_checkpoint latest."
        )

    # ---- what a run leaves behind

    def save(self, name: str) -> Path:
        """Writes a checkpoint; the main process does, and the others wait for it."""
        folder = self.args.output_dir / name
        in_every_process(self.accelerator, lambda: self.save_here(folder) if self.accelerator.is_main_process else None)
        return folder

    def save_here(self, folder: Path) -> None:
        args, scaler = self.args, self.accelerator.scaler
        state = {
            "step": self.step,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(folder, attention_prompts_of(self.pipe.unet), self.settings(), state)
        if args.checkpoints_total_limit:
            remove_oldest(args.output_dir, args.train_data, args.checkpoints_total_limit)

    def settings(self) -> dict[str, Any]:
        """Everything that led to these weights, and what was measured with them."""
        unsaid = ("hub_token", "push_to_hub", "hub_model_id", "resume_from_checkpoint", "model")
        flags = {name: value for name, value in vars(self.args).items() if name not in unsaid}
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
        found = {"attention_weight": self.attention_weight, "metrics": self.figures}
        return self.identity() | flags | found | {"step": self.step, "versions": versions()}

    def identity(self) -> dict[str, Any]:
        """What a run must share with the one it goes on from."""
        args = self.args
        same = ("rank", "train_data", "score", "halves", "seed", "max_train_samples", "use_validation_split")
        return {
            "pretrained_model_name_or_path": args.model,
            **{name: getattr(args, name) for name in (*same, "fit_attention_weight")},
            "items_per_step": self.per_step,
        }

    def resume(self) -> None:
        args = self.args
        folder = find_checkpoint(args.resume_from_checkpoint, args.output_dir, args.train_data)
        if folder is None:
            print(f"There is no checkpoint in {args.output_dir} yet: starting at step 0.", flush=True)
            return
        _, state = load_state(folder, self.identity())
        prompts = read_attention_prompts(folder)
        check_prompts_fit(prompts, self.pipe.unet, args.model)
        set_attention_prompts(self.pipe.unet, prompts.state_dict)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        self.step, self.best = state["step"], state["best"]

    def score_settings(self, score: str) -> ScoreSettings:
        """How held-out items are scored during the training."""
        args = self.args
        return ScoreSettings(
            sampling_steps=args.sampling_time_steps,
            score=score,
            halves=args.halves,
            seed=args.seed,
            batch_size=args.val_batch_size,
            attention_weight=self.attention_weight,
            untuned_denoising=args.untuned_denoising,
        )

    def evaluate(self, benchmark: Any, folder: Path, limit: int | None = None) -> dict[str, Figure]:
        """The evaluation of dsd_infer.py with the attention prompts as they are now; figures in every process."""
        if self.accelerator.is_main_process and folder.exists():
            shutil.rmtree(folder)  # of an earlier training, with other weights
        self.accelerator.wait_for_everyone()
        args = self.args
        how = self.score_settings(args.score)
        self.pipe.unet.eval()
        settings = {"model": args.model, "checkpoint": f"step {self.step} of {args.output_dir}"}
        figures = evaluate(self.pipe, benchmark, how, folder, self.accelerator, limit, settings)
        self.pipe.unet.train()
        return broadcast_object_list([figures])[0]

    def validate(self) -> None:
        args = self.args
        folder = args.output_dir / "validation" / f"step-{self.step}"
        figures = self.evaluate(self.held_out, folder, args.val_num)
        value = figures[MAIN_FIGURE[self.held_out.metrics]]["value"]
        self.accelerator.log({f"validation/{name}": figure["value"] for name, figure in figures.items()}, self.step)
        if value > self.best:
            self.best = value
            self.figures = {f"{self.held_out.name} (validation)": figures}
            self.save(BEST_NAME)
        # again, because a run that goes on from here must know what the best was
        self.save(f"{args.train_data}-checkpoint-{self.step}")

    def fit_weight(self) -> float:
        """w of the hybrid score, learned from the training items that were kept apart; the same in every process."""
        args, items = self.args, self.train_items(self.pipe.resolution)
        how = self.score_settings("hybrid").arguments()
        kept = range(self.count, self.count + args.fit_attention_weight)
        self.pipe.unet.eval()
        terms = []  # of each example's candidates, the right one first
        for index in kept[self.accelerator.process_index :: self.accelerator.num_processes]:
            item = items[index]
            (output,) = self.pipe.score_items([(item.images, item.texts)], **how, names=[item.id])
            for example in examples_of(item):
                order = [example.positive, *(i for i in range(len(example.candidates)) if i != example.positive)]
                places = [example.candidates[i][:2] for i in order]
                terms.append(
                    [[float(term[place]) for place in places] for term in (output.attention, output.denoising)]
                )
        self.pipe.unet.train()
        attention, denoising = zip(*gather_object(terms), strict=True)
        return fit_attention_weight(attention, denoising)

    def finish(self) -> None:
        args, main = self.args, self.accelerator.is_main_process
        self.figures = {}
        if args.fit_attention_weight:
            self.attention_weight = self.fit_weight()
            if main:
                print(f"In the hybrid score the attention term counts {self.attention_weight:.4g}.")
        final = self.save(f"final-checkpoint-{self.step}")
        if self.val_data is not None:
            folder = args.output_dir / f"results-{self.val_data.name}"
            self.figures = {self.val_data.name: self.evaluate(self.val_data, folder)}
            self.save(final.name)
        if main:
            for name, figures in self.figures.items():
                print(f"{name}, {args.score} score, seed {args.seed}")
                print(format_table(figures))
            print(f"The attention prompts are in {final}")
        self.accelerator.end_training()
        if args.push_to_hub and main:
            name = args.hub_model_id or args.output_dir.resolve().name
            print(push_to_hub(final, name, model_card(name, self.settings(), self.figures), args.hub_token))

    def start_trackers(self) -> None:
        settings = {name: value for name, value in self.settings().items() if isinstance(value, (str, int, float))}
        self.accelerator.init_trackers("dsd", config=settings)

    def note_signal(self, number: int, frame: Any) -> None:
        if self.stop_signal is not None:  # the second time the user means it
            raise KeyboardInterrupt
        self.stop_signal = number


def read_tokenizer(folder: str) -> CLIPTokenizer:
    try:
        if not Path(folder).is_dir():  # Transformers would make an empty tokenizer of nothing
            raise FileNotFoundError(folder)
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Transformers raises anything for a folder that is none
        raise DSDError(f"--tokenizer {folder} is not the folder of a CLIP tokenizer: give another one.") from error


def check_packages(args: argparse.Namespace) -> None:
    """Raises DSDError for a package that a flag needs and that is not installed."""
    wanted = {args.report_to: f"--report_to {args.report_to}"} if args.report_to in TRACKERS else {}
    if args.use_8bit_adam:
        wanted["bitsandbytes"] = "--use_8bit_adam"
    for package, flag in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise DSDError(f"{flag} needs the package {package}: run `pip install {package}`, or leave the flag out.")


def make_writable(folder: Path) -> None:
    """Raises DSDError where nothing can be written."""
    write_text(folder / ".writable", "")
    (folder / ".writable").unlink(missing_ok=True)  # another process may have been faster


if __name__ == "__main__":
    main()
