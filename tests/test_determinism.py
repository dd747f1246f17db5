"""--seed fixes everything: two evaluations in fresh processes write the same bytes."""

import subprocess
import sys

from launch import environment, results_of, scores_of
from prefork import run

from conftest import ROOT

ARGS = ["--val_data", "Shapes_text", "--limit", "5", "--sampling_steps", "3"]
ARGS += ["--checkpoint", "assets/shapes-sd-prompts"]


def evaluate(folder, seed, hash_seed):
    """dsd_infer.py in a new interpreter; what Python does by hashes of strings is ordered otherwise in each."""
    done = subprocess.run(
        [sys.executable, "dsd_infer.py", *ARGS, "--seed", seed, "--results_dir", folder],
        cwd=ROOT,
        env=environment() | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_same_command_writes_the_same_bytes(tmp_path):
    one, two = (evaluate(tmp_path / name, "7", name) for name in ("1", "2"))
    for name in ("scores.jsonl", "settings.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    results = [results_of(folder) for folder in (one, two)]
    for each in results:  # a time, and the two folders' names
        assert each.pop("seconds_per_item") > 0 and each["run"].pop("command").startswith("dsd_infer.py --val_data")
    assert results[0] == results[1]
    run([*ARGS, "--seed", "8", "--results_dir", str(tmp_path / "other")], tmp_path / "words")
    for ours, theirs in zip(scores_of(one), scores_of(tmp_path / "other"), strict=True):
        assert ours["texts"] != theirs["texts"] and ours["scores"] != theirs["scores"]
