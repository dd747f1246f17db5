"""The benchmarks run, on the bundled model, and compare what they say they compare."""

import importlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.timesteps import choose, plain, share_right
from diffusers_dsd.timestep_weights import fit_weights, read_weights


@pytest.fixture
def run(monkeypatch, capsys):
    """A benchmark with these arguments: the cells of the table it prints, and all it prints."""

    def run(module, *args):
        monkeypatch.setattr("sys.argv", [module, *map(str, args)])
        importlib.import_module(f"benchmarks.{module}").main()
        printed = capsys.readouterr().out
        return [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")], printed

    return run


def test_scoring(run):
    """Stops itself where ours and the plain implementation give different scores."""
    table, printed = run("scoring", "--workloads", 3, 5, "--repeats", 1)
    assert len(table) == 3
    for line in table[1:]:
        published, ours = (float(line[place].replace(",", "")) for place in (4, 5))
        assert published > 2 * ours > 0, "floating-point operations"
    assert "peak memory" in printed


def test_training(run):
    """Stops itself where the three ways give different gradients."""
    table, _ = run("training", "--repeats", 1)
    kept = {(line[0], line[1]): float(line[4].split()[0]) for line in table[1:]}
    for score in ("hybrid", "attention"):
        assert kept[score, "two passes"] < kept[score, "published"] / 4


def test_adaptive(run, tmp_path):
    how = ["--limit", 6, "--sampling_time_steps", 10, "--scores_dir", tmp_path, "--output", tmp_path / "races.png"]
    table, _ = run("adaptive", *how)
    assert len(table) == 1 + 4 * 3 and all(line[4] == "6" for line in table[1:])
    assert run("adaptive", *how)[0] == table, "from the scores that are there"
    assert Image.open(tmp_path / "races.png").width > 500


def test_timesteps(run, tmp_path):
    table, _ = run("timesteps", "--train_items", 6, "--limit", 4, "--budget", 3, "--output", tmp_path)
    assert [line[0] for line in table[1:]] == ["1", "2", "5", "10", "20", "40"]
    assert 1 <= len(read_weights(tmp_path).timesteps) <= 3


@pytest.fixture(scope="module")
def examples():
    """Right minus wrong candidates in 8 timesteps × (2 layers, denoising): two features tell, one misleads."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(400, 1, 40, 3))
    differences[:, :, 12, 1] += 1.5
    differences[:, :, 20, 2] += 1.0
    differences[:, :, 30, 0] -= 2.0
    return list(differences)


def test_weights_find_what_tells(examples):
    weights = fit_weights(np.concatenate(examples), penalty=0.05)
    assert weights.shape == (40, 3) and weights.min() == 0
    assert sorted(map(tuple, np.argwhere(weights > 0.2).tolist())) == [(12, 1), (20, 2)]


def test_few_timesteps_are_chosen_from_the_training_examples_alone(examples):
    weights = choose(examples[:200], budget=2)
    assert set(np.argwhere(weights.any(1)).ravel()) == {12, 20}
    assert share_right(examples[200:], weights) > share_right(examples[200:], plain(40, 3, 1, 1)) + 0.1
