"""Runs the real scripts the way users do, and reads what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def environment() -> dict[str, str]:
    """Offline, and one thread per process so that two do not fight over cores."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def launch(script: str, *args: str, processes: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`accelerate launch` on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    return subprocess.run(
        [*command, script, *map(str, args)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def scores_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
