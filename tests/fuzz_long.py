"""Fuzzes one reader of foreign files for as long as one likes: python tests/fuzz_long.py TARGET --seconds N

Every round has another seed. A failure is printed with the smallest content that causes it, and ends the run.
"""

import argparse
import secrets
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # custom_datasets.py

from fuzz_targets import TARGETS, limit_memory
from hypothesis import HealthCheck, given, seed, settings

ROUND = 500  # cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="after which no further round is begun (default: 60)")
    args = parser.parse_args()
    content, target = TARGETS[args.target]
    cases = 0

    def counted(data: object) -> None:
        nonlocal cases
        cases += 1
        target(data)

    limit_memory()
    checks = settings(max_examples=ROUND, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
        number = secrets.randbelow(2**32)
        seed(number)(checks(given(content)(counted)))()
        print(f"{args.target}: {cases} cases, the last {ROUND} with seed {number}", flush=True)


if __name__ == "__main__":
    main()
