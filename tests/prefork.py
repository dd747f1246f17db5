"""Starts dsd_infer.py and dsd_train.py many times over without waiting for their imports.

A server process has imported what the scripts need; every process that is started is forked from it, runs the script
file as `__main__`, and can be killed like any other. Several of them find each other as under torchrun.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["diffusers_dsd.evaluation", "diffusers_dsd.models", "diffusers_dsd.hub", "pandas"])


def start(
    args: Sequence[object],
    output: Path,
    processes: int = 1,
    kill_at: tuple[str, str, int] | None = None,
    cwds: Sequence[Path] = (),
    script: Path = ROOT / "dsd_infer.py",
) -> list[BaseProcess]:
    """Starts a script in several processes.

    Args:
        args: its arguments.
        output: where its words go.
        kill_at: an audit event of Python, part of a path and k: the main process kills itself at the k-th such event.
        cwds: where each process is, if they are not in the script's folder.
        script: the script.
    """
    port, started = free_port(), []
    for rank in range(processes):
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
        cwd = cwds[rank] if cwds else script.parent
        what = script, list(map(str, args)), environment, output, None if rank else kill_at, cwd
        process = _CONTEXT.Process(target=_run, args=what)
        process.start()
        started.append(process)
    return started


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(
    args: Sequence[object],
    output: Path,
    processes: int = 1,
    script: Path = ROOT / "dsd_infer.py",
    status: int = 0,
) -> str:
    """Runs a script to its end, which must be this exit status, in one or several processes; returns what it said."""
    for process in start(args, output, processes, script=script):
        process.join(120)
        assert process.exitcode == status, output.read_text()
    return output.read_text()


def _run(
    script: Path,
    args: list[str],
    environment: dict[str, str],
    output: Path,
    kill_at: tuple[str, str, int] | None,
    cwd: Path,
) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    words = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.argv = [script.name, *args]
    sys.path.insert(0, str(script.parent))
    if kill_at:
        _kill_at(*kill_at)
    runpy.run_path(str(script), run_name="__main__")


def _kill_at(wanted: str, part: str, number: int) -> None:
    left = number

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event == wanted and any(part in str(arg) for arg in args):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
