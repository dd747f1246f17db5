"""Fuzzes one reader of foreign files for as long as one likes: python tests/fuzz_long.py TARGET --seconds N

Every round has another seed. A failure is printed with the smallest content that causes it, and ends the run. With
--coverage, atheris (pip install atheris, where it installs) looks for content that reaches new lines of our readers.
"""

import argparse
import importlib
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # custom_datasets.py

from hypothesis import HealthCheck, given, seed, settings

ROUND = 500  # cases
OURS = ["custom_datasets", "pickletools", *(f"diffusers_dsd.{name}" for name in ("images", "prompts", "safe_pickle"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="one of fuzz_targets.TARGETS")
    parser.add_argument("--seconds", type=int, default=60, help="after which no further round is begun (default: 60)")
    parser.add_argument("--coverage", action="store_true", help="let atheris lead")
    args = parser.parse_args()
    atheris = None
    if args.coverage:
        try:
            atheris = importlib.import_module("atheris")
        except ImportError:
            parser.error("--coverage needs atheris: pip install atheris")
    with atheris.instrument_imports(include=OURS) if atheris else nullcontext():
        from fuzz_targets import TARGETS, limit_memory
    if args.target not in TARGETS:
        parser.error(f"there is no target {args.target}: choose one of {', '.join(TARGETS)}")
    content, target = TARGETS[args.target]
    checks = settings(max_examples=ROUND, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    limit_memory()
    if atheris:
        test = checks(given(content)(target)).hypothesis.fuzz_one_input
        atheris.Setup([sys.argv[0], f"-max_total_time={args.seconds}", "-max_len=8192"], test)
        atheris.Fuzz()
    else:
        rounds(args.target, lambda test: checks(given(content)(test)), target, args.seconds)


def rounds(name: str, checks: Callable[[Any], Any], target: Callable[[Any], None], seconds: float) -> None:
    """Hypothesis' own search, round after round."""
    cases = 0

    def counted(data: object) -> None:
        nonlocal cases
        cases += 1
        target(data)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = secrets.randbelow(2**32)
        seed(number)(checks(counted))()
        print(f"{name}: {cases} cases, the last {ROUND} with seed {number}", flush=True)


if __name__ == "__main__":
    main()
