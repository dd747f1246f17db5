"""What the command-line scripts share: kinds of flags, and ending in one sentence instead of a traceback."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import gather_object

from diffusers_dsd.errors import DSDError

T = TypeVar("T")


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3, …"""
    return _int_from(1, text)


def non_negative_int(text: str) -> int:
    """An argparse type: 0, 1, 2, …"""
    return _int_from(0, text)


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    number = non_negative_float(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number, 0 or above."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of 0 or above")
    return number


def settle_score(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes one flag of --score and --bias, the historical name of --score attention; neither is hybrid."""
    if args.bias and args.score not in (None, "attention"):
        parser.error(f"--bias is --score attention, and --score {args.score} was given too: choose one of them.")
    args.score = "attention" if args.bias else args.score or "hybrid"


def _int_from(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return number


@contextmanager
def ends_in_a_sentence(program: str) -> Iterator[None]:
    """Prints a user's mistake without a traceback and leaves with status 1; Ctrl-C leaves with 130."""
    try:
        yield
    except DSDError as error:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def make_accelerator(**options: Any) -> Accelerator:
    """The `Accelerator` for however the script was launched, on CPUs where there is nothing else.

    `accelerate launch --num_processes N` starts a single process where it finds no GPU, or with --cpu (it leaves the
    rest to mpirun). The script is then started again under torchrun, in N processes that talk over gloo; with
    --num_machines M on each of them, in N / M processes that find the others at --main_process_ip.

    Raises:
        DSDError: several machines were asked for, but their processes would not know of each other.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    launched_alone = "MASTER_ADDR" in os.environ and not {"RANK", "LOCAL_RANK", "PMI_SIZE"} & set(os.environ)
    if launched_alone and (torchrun := _torchrun_command(on_cpu)):
        os.execv(sys.executable, torchrun)
    return Accelerator(cpu=on_cpu, **options)


def _torchrun_command(on_cpu: bool) -> list[str] | None:
    """What `accelerate launch` was asked for, told by the parent's command line, as a torchrun command.

    Raises:
        DSDError: see `make_accelerator`.
    """
    command = psutil.Process().parent().cmdline()
    start = next((i for i, word in enumerate(command) if word.removesuffix(".py").endswith("launch")), None)
    if start is None:
        return None
    asked = launch_command_parser().parse_args(command[start + 1 :])
    machines, processes = asked.num_machines or 1, asked.num_processes or 1
    if machines > 1 and not on_cpu:  # it takes one GPU per machine for one process in all
        raise DSDError(
            f"--num_machines {machines}: accelerate launch has started a process that does not know of the other "
            f"machines: add --multi_gpu to its flags."
        )
    if processes % machines:
        raise DSDError(
            f"--num_processes {processes} on --num_machines {machines}: it counts the processes of all machines, so "
            f"give a multiple of {machines}."
        )
    if not on_cpu or processes == 1:
        return None
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes // machines}"]
    if machines == 1:
        torchrun.append("--standalone")  # finds a free port
    else:
        torchrun += [f"--nnodes={machines}", f"--node_rank={asked.machine_rank}"]
        torchrun += [f"--master_addr={asked.main_process_ip}", f"--master_port={asked.main_process_port}"]
    return [*torchrun, *sys.argv]


def in_every_process(accelerator: Accelerator, step: Callable[[], T]) -> T:
    """The result of a step that all processes take; where it fails in any, all stop and one says why.

    Raises:
        DSDError: in the main process, the first process's mistake.
        SystemExit: in the others.
    """
    result, mistake = None, None
    try:
        result = step()
    except DSDError as error:
        mistake = str(error)
    mistakes = [message for message in gather_object([mistake]) if message]
    if not mistakes:
        return result  # type: ignore[return-value]
    if accelerator.is_main_process:
        raise DSDError(mistakes[0])
    raise SystemExit(1)


def wait_for_the_others(accelerator: Accelerator) -> None:
    """A barrier that leaves quietly where another process has stopped, which has said why itself."""
    try:
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        raise SystemExit(1) from error
