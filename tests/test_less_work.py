"""The command line's ways to less work, launched for real."""

import json

import prefork
import pytest
import torch
from launch import launch, results_of, scores_of
from test_infer import checkout  # noqa: F401 - a fixture

from diffusers_dsd import DSDPipeline
from diffusers_dsd.attention import scored_layers
from diffusers_dsd.models import SHAPES_SD
from diffusers_dsd.timestep_weights import FILE_NAME, TimestepWeights
from dsd_infer import parse_args


def test_races_decide_as_the_full_grid_does(tmp_path):
    args = ["--val_data", "Shapes_text", "--limit", "7", "--sampling_time_steps", "20", "--score", "denoising"]
    prefork.run([*args, "--results_dir", tmp_path / "full"], tmp_path / "words")
    args += ["--adaptive", "0.95", "--results_dir", tmp_path / "races"]
    printed = prefork.run(args, tmp_path / "words", processes=2)
    races, full = scores_of(tmp_path / "races"), scores_of(tmp_path / "full")
    for race, grid in zip(races, full, strict=True):
        winner, (scores,) = race["scores"][0].index(0.0), grid["scores"]
        assert race["id"] == grid["id"] and scores[winner] == max(scores)
        assert race["correct"] == (winner == race["label"]) and max(race["looked"]) <= 20
    results = results_of(tmp_path / "races")
    share = sum(sum(race["looked"]) for race in races) / (7 * 10 * 20)
    assert results["share_of_full_grid"] == pytest.approx(share) and share < 0.9
    assert f"{share:.1%} of the full grid" in printed
    assert set(results["metrics"]) == {"recall@1"}, "a race knows its winner, and no other rank"


def test_layers_and_a_cache_on_disk(checkout, tmp_path):  # noqa: F811
    command = ["--val_data", "ComVG", "--model", "tiny", "--limit", "3", "--sampling_time_steps", "4"]
    command += ["--score", "attention", "--layers", "down,mid", "--cache_dir_features", tmp_path / "features"]
    for folder in ("first", "second"):
        args = [*command, "--results_dir", tmp_path / folder]
        prefork.run(args, tmp_path / "words", script=checkout / "dsd_infer.py")
    first, second = scores_of(tmp_path / "first"), scores_of(tmp_path / "second")
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(torch.tensor(one["scores"]), torch.tensor(other["scores"]), atol=1e-5, rtol=0)
    assert results_of(tmp_path / "first")["settings"]["layers"] == ["down", "mid"]
    assert list((tmp_path / "features").rglob("*.safetensors")), "latents and prompt embeddings"


def test_weights_replace_the_averages(tmp_path):
    layers = len(scored_layers(DSDPipeline.from_pretrained(SHAPES_SD).unet))
    weights = TimestepWeights([200, 600], [[0.0] * layers, [0.25] * layers], [1.5, 0.5])
    weights.save(tmp_path / FILE_NAME)
    done = launch("dsd_infer.py", "--limit", "2", "--weights", tmp_path, "--compile", "--results_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "weighted score" in done.stdout
    for record in scores_of(tmp_path / "out"):
        attention, denoising, scores = (torch.tensor(record[name]) for name in ("attention", "denoising", "scores"))
        torch.testing.assert_close(attention + denoising, scores)
    settings = results_of(tmp_path / "out")["settings"]
    assert json.loads((tmp_path / FILE_NAME).read_text()) == settings["weights"]
    assert settings["sampling_time_steps"] == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--weights", "w", "--score", "attention"], "--weights w decide what --score does"),
        (["--weights", "w", "--adaptive", "0.9"], "--weights w decide what --adaptive does"),
        (["--score", "denoising", "--layers", "mid"], "--layers are of the attention term"),
        (["--adaptive", "1"], "choose a confidence"),
        (["--batchsize", "many"], "--batchsize"),
        (["--layers", "down,sideways"], "sideways"),
    ],
)
def test_the_parser_refuses(args, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(args)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--weights", "no/such"], "There are no weights no/such"),
        (["--val_data", "winoground", "--adaptive", "0.9"], "--adaptive"),
    ],
)
def test_bad_flags_are_one_sentence(checkout, tmp_path, args, words):  # noqa: F811
    said = prefork.run(
        ["--model", "tiny", "--limit", "1", "--results_dir", tmp_path / "out", *args],
        tmp_path / "words",
        script=checkout / "dsd_infer.py",
        status=1,
    )
    assert words in said and said.count("dsd_infer.py: ") == 1 and "Traceback" not in said
