"""An evaluation that is killed again and again ends with what an undisturbed one ends with."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import results_of, scores_of
from prefork import run, start
from safetensors.torch import load_file, save_file

from diffusers_dsd.metrics import format_table
from diffusers_dsd.models import SHAPES_PROMPTS
from diffusers_dsd.prompts import WEIGHTS_NAME
from diffusers_dsd.results import load_records

ITEMS = 131
ARGS = ["--val_data", "Shapes", "--limit", str(ITEMS), "--sampling_steps", "1", "--score", "attention"]
ARGS += ["--batchsize", "1", "--seed", "3"]
# Moments while the shards are put together and the figures written: before the merged file gets its name, before a
# shard is removed, before the figures are written and before they get their name. Each comes later than the one before.
MERGING = [
    ("os.rename", "scores.jsonl", 1),
    ("os.remove", "scores-0", 1),
    ("open", ".results.json", 1),
    ("os.rename", "results.json", 1),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run([*ARGS, "--results_dir", str(folder / "out")], folder / "words")
    return folder / "out"


def written(folder):
    """Bytes of all shards, and of the merged file if there is one."""
    return sum(path.stat().st_size for path in folder.glob("scores*.jsonl"))


def kill_once_written(processes, victims, folder, size):
    """SIGKILL as soon as the shards hold `size` bytes; processes that are spared end by themselves."""
    deadline = time.monotonic() + 120
    while written(folder) < size:
        assert all(process.is_alive() for process in processes), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0002)
    for process in victims:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if process in victims else 1)


def lose_the_end(rng, folder):
    """Cuts a shard within its last line, as a machine that loses its power may leave it."""
    shards = [path for path in folder.glob("scores-*.jsonl") if path.stat().st_size]
    if shards:
        shard = rng.choice(sorted(shards))
        last = len(shard.read_bytes().splitlines(keepends=True)[-1])
        os.truncate(shard, shard.stat().st_size - rng.randrange(1, last))


def assert_the_same(folder, undisturbed):
    """Every item once, in order, with the same question, outcome and scores; and the same figures."""
    ours, theirs = scores_of(folder), scores_of(undisturbed)
    assert [record["index"] for record in ours] == list(range(ITEMS))
    for our, their in zip(ours, theirs, strict=True):
        for name in ("scores", "attention"):
            torch.testing.assert_close(
                torch.tensor(our.pop(name)), torch.tensor(their.pop(name)), atol=1e-5, rtol=0, msg=str(our["id"])
            )
        assert our == their
    assert results_of(folder)["metrics"] == results_of(undisturbed)["metrics"]
    assert results_of(folder)["settings"] == results_of(undisturbed)["settings"]
    assert {path.name for path in folder.iterdir()} == {"scores.jsonl", "results.json", "settings.json"}


# 20 kills: how many processes each run has that is killed, and then the one that is left in peace
@pytest.mark.parametrize(
    ("seed", "scoring", "merging", "last"),
    [(0, [1] * 5, [1] * 2, 1), (1, [2] * 5, [2] * 2, 2), (2, [2, 1, 3, 2], [1, 2], 3)],
    ids=["1-process", "2-processes", "another-number-each-time"],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_scores(
    tmp_path, undisturbed, seed, scoring, merging, last
):
    rng = random.Random(seed)
    folder, words = tmp_path / "out", tmp_path / "words"
    args, whole = [*ARGS, "--results_dir", str(folder)], written(undisturbed)
    for turn, count in enumerate(scoring):
        size = written(folder) + rng.randrange(1, (whole - written(folder)) // (len(scoring) - turn + 2))
        processes = start(args, words, count)
        # at last, one process only: the others find out at the end of their shares
        victims = [rng.choice(processes)] if turn == len(scoring) - 1 else processes
        kill_once_written(processes, victims, folder, size)
        assert not (folder / "results.json").exists()
        scored = [record["index"] for shard in folder.glob("scores-*.jsonl") for record in load_records(shard)]
        assert len(scored) == len(set(scored)), "an item was scored again"
        if rng.random() < 0.6:
            lose_the_end(rng, folder)
    moments = sorted(rng.sample(range(len(MERGING)), len(merging)))
    for moment, count in zip(moments, merging, strict=True):
        main, *others = start(args, words, count, kill_at=MERGING[moment])
        main.join(120)
        assert main.exitcode == -signal.SIGKILL, words.read_text()
        for process in others:
            process.join(120)
            assert process.exitcode is not None
    run([*args, "--resume"], words, last)
    assert_the_same(folder, undisturbed)


def test_a_finished_run_that_is_resumed_shows_its_figures_and_writes_nothing(tmp_path, undisturbed):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in undisturbed.iterdir()}
    for processes in (1, 2):
        words = tmp_path / f"words-{processes}"
        run([*ARGS, "--results_dir", str(undisturbed), "--resume"], words, processes)
        said = words.read_text()
        assert format_table(results_of(undisturbed)["metrics"]) in said and "item/s" not in said
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in undisturbed.iterdir()} == before


def test_figures_that_cannot_be_read_are_computed_again(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text("{")
    run([*ARGS, "--results_dir", str(tmp_path / "out")], tmp_path / "words")
    assert_the_same(tmp_path / "out", undisturbed)


def test_resume_without_a_folder_takes_the_newest_of_the_same_settings(tmp_path, monkeypatch, capsys):
    import dsd_infer

    def infer(*args):
        monkeypatch.setattr("sys.argv", ["dsd_infer.py", "--limit", "2", "--sampling_steps", "1", *args])
        dsd_infer.main()
        return capsys.readouterr().out.split()[-1]

    def refused(*args):
        with pytest.raises(SystemExit) as stop:
            infer(*args)
        error = capsys.readouterr().err
        assert stop.value.code == 1 and error.count("dsd_infer.py: ") == 1
        return error

    monkeypatch.setattr(dsd_infer, "ROOT", tmp_path)
    assert "--resume: there is nothing to resume in" in refused("--resume")
    assert not list(tmp_path.iterdir())
    folder = infer()
    assert Path(folder).parent == tmp_path / "results" and Path(folder).name.startswith("Shapes-shapes-sd-")
    assert infer("--resume") == folder
    assert "seed was 0 and is now 1" in refused("--resume", "--seed", "1")
    assert "seed was 0 and is now 1" in refused("--seed", "1", "--results_dir", folder)
    prompts = shutil.copytree(SHAPES_PROMPTS, tmp_path / "prompts")
    tuned = infer("--checkpoint", str(prompts), "--results_dir", str(tmp_path / "tuned"))
    weights = load_file(prompts / WEIGHTS_NAME)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, prompts / WEIGHTS_NAME)  # trained on
    assert "checkpoint_sha256 was " in refused("--checkpoint", str(prompts), "--results_dir", tuned)
    empty = tmp_path / "empty"
    assert f"nothing to resume in {empty}: leave --resume out" in refused("--resume", "--results_dir", str(empty))
    assert not empty.exists()
