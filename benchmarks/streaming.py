"""Memory of an evaluation over the number of its items: it must not grow with them.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py 1000 5000 20000 50000

Runs dsd_infer.py in a fresh process for each number, on so many items of Shapes (an endless list, which
custom_datasets.py cuts at 1,200) with one timestep and the attention score, and asks the system for the process's
resident memory: after 500 items, when the last item is scored, and at its peak, merging and figures included. What was
measured: benchmarks/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
EARLY = 500  # items after which everything that does not depend on their number is in memory
# dsd_infer.py as it is, after the endless list of Shapes was cut elsewhere
RUN = """
import runpy, sys
import custom_datasets
custom_datasets.SHAPES_LENGTH["eval"] = int(sys.argv[1])
del sys.argv[:2]  # "-c" and the number
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Memory:
    """Resident memory of one run, in MiB.

    Attributes:
        items: how many were scored.
        early: after `EARLY` items.
        scored: the last that was seen before the shard was merged.
        peak: the system's own record over the whole run.
        seconds: it took.
    """

    items: int
    early: float
    scored: float
    peak: float
    seconds: float


def measure(items: int, folder: Path) -> Memory:
    """Runs dsd_infer.py on `items` items into `folder` and watches it.

    Raises:
        SystemExit: the run failed, and has said why.
    """
    command = [sys.executable, "-c", RUN, str(items), str(ROOT / "dsd_infer.py"), "--results_dir", str(folder)]
    command += ["--val_data", "Shapes", "--sampling_time_steps", "1", "--score", "attention"]
    command += ["--batchsize", "16"]  # not auto: the items that are held between two writes would depend on the machine
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    watched, shard = psutil.Process(child.pid), folder / "scores-00000.jsonl"
    lines, read, early, scored, ended = 0, 0, 0.0, 0.0, 0
    while not ended:
        time.sleep(0.2)
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        try:
            resident = watched.memory_info().rss / 2**20
            with shard.open("rb") as file:
                file.seek(read)
                new = file.read()
        except (OSError, psutil.Error):  # not started yet, merged already, or ended
            continue
        lines, read = lines + new.count(b"\n"), read + len(new)
        if lines >= EARLY and resident:
            early, scored = early or resident, resident
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"dsd_infer.py ended with status {child.returncode}.")
    return Memory(items, early, scored, usage.ru_maxrss / 2**10, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=int, nargs="+", metavar="N", help=f"numbers of items, each above {EARLY}")
    args = parser.parse_args()
    if min(args.items) <= EARLY:
        parser.error(f"{min(args.items)} items are too few: give numbers above {EARLY}.")
    print(f"{'items':>8} {f'after {EARLY}':>12} {'last item':>12} {'peak':>12} {'seconds':>9}   (resident MiB)")
    with tempfile.TemporaryDirectory() as folder:
        for items in args.items:
            one = measure(items, Path(folder) / str(items))
            n = len((Path(folder) / str(items) / "scores.jsonl").read_bytes().splitlines())
            figures = json.loads((Path(folder) / str(items) / "results.json").read_text())["metrics"]
            if not n == figures["accuracy"]["n"] == items:
                raise SystemExit(f"{items} items were asked for and {n} are in scores.jsonl.")
            print(
                f"{items:>8} {one.early:>12.1f} {one.scored:>12.1f} {one.peak:>12.1f} {one.seconds:>9.0f}", flush=True
            )


if __name__ == "__main__":
    main()
