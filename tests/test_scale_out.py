"""An evaluation in several processes and on several machines: every item once, whatever their number."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import environment, results_of, scores_of
from prefork import free_port, run, start

from conftest import ROOT
from diffusers_dsd import DSDError, cli
from diffusers_dsd.results import load_records

ITEMS = 7
ARGS = ["--val_data", "Shapes", "--sampling_steps", "1", "--score", "attention"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The scores of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run([*ARGS, "--limit", str(ITEMS), "--results_dir", str(folder / "out")], folder / "words")
    return scores_of(folder / "out")


def assert_scores(records, expected):
    assert [record["id"] for record in records] == [record["id"] for record in expected]
    for record, other in zip(records, expected, strict=True):
        torch.testing.assert_close(torch.tensor(record["scores"]), torch.tensor(other["scores"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("processes", "items"), [(2, 1), (2, 5), (3, 1), (3, 2), (3, 7)])
def test_counts_that_do_not_divide(tmp_path, alone, processes, items):
    args = [*ARGS, "--limit", str(items), "--results_dir", str(tmp_path / "out")]
    run(args, tmp_path / "words", processes)
    assert_scores(scores_of(tmp_path / "out"), alone[:items])
    results = results_of(tmp_path / "out")
    assert results["metrics"]["accuracy"]["n"] == items and results["run"]["num_processes"] == processes


def test_each_process_writes_its_own_items(tmp_path, alone):
    args = [*ARGS, "--limit", str(ITEMS), "--results_dir", str(tmp_path / "out")]
    # stopped before the shards are put together
    main, *others = start(args, tmp_path / "words", 3, kill_at=("os.rename", "scores.jsonl", 1))
    for process in (main, *others):
        process.join(120)
    assert main.exitcode == -signal.SIGKILL
    for rank in range(3):
        records = list(load_records(tmp_path / "out" / f"scores-{rank:05}.jsonl"))
        assert [record["index"] for record in records] == list(range(rank, ITEMS, 3))
        assert_scores(records, alone[rank::3])


def machine(rank: int, port: int, cwd: Path, *args: str) -> subprocess.Popen:
    """One of two machines, in one process each, as the README starts them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "2"]
    command += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
    command += ["--main_process_port", str(port), ROOT / "dsd_infer.py", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=cwd, env=environment(), text=True, **pipes)


def test_two_machines(tmp_path, alone):
    args = [*ARGS, "--limit", str(ITEMS), "--results_dir", str(tmp_path / "out")]
    port = free_port()
    machines = [machine(rank, port, tmp_path, *args) for rank in range(2)]
    words = [each.communicate(timeout=200)[0] for each in machines]
    assert [each.returncode for each in machines] == [0, 0], words
    assert ["accuracy" in said for said in words] == [True, False]
    assert_scores(scores_of(tmp_path / "out"), alone)
    assert results_of(tmp_path / "out")["run"]["num_processes"] == 2


def test_machines_that_share_no_disk_end_in_a_sentence_and_lose_nothing(tmp_path, alone):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    args = [*ARGS, "--limit", str(ITEMS), "--results_dir", "out"]  # so each in a folder of its own
    main, other = start(args, tmp_path / "words", 2, cwds=[here, there])
    main.join(120), other.join(120)
    assert (main.exitcode, other.exitcode) == (1, 0)
    words = (tmp_path / "words").read_text()
    assert "dsd_infer.py: out holds 4 of 7 items" in words and "Traceback" not in words
    assert not (here / "out" / "results.json").exists() and not (here / "out" / "scores.jsonl").exists()

    shutil.copy(there / "out" / "scores-00001.jsonl", here / "out")
    (main,) = start([*args, "--resume"], tmp_path / "words", cwds=[here])
    main.join(120)
    assert main.exitcode == 0
    assert_scores(scores_of(here / "out"), alone)


@pytest.mark.parametrize(
    ("flags", "on_cpu", "words"),
    [
        (["--num_machines", "2", "--num_processes", "3"], True, "--num_processes 3 on --num_machines 2"),
        (["--num_machines", "2"], True, "give a multiple of 2"),
        (["--num_machines", "2", "--num_processes", "2"], False, "add --multi_gpu"),
    ],
)
def test_machines_that_would_not_know_of_each_other_are_refused(monkeypatch, flags, on_cpu, words):
    class Launcher:
        def parent(self):
            return self

        def cmdline(self):
            return ["python", "/bin/accelerate", "launch", *flags, "dsd_infer.py"]

    monkeypatch.setattr("psutil.Process", Launcher)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: not on_cpu)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    for name in ("RANK", "LOCAL_RANK", "PMI_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DSDError, match=words):
        cli.make_accelerator()
