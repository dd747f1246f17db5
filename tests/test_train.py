"""dsd_train.py, launched for real: checkpoints, kills, processes, precision, validation, bad flags."""

import json
import os
import re
import shutil
import signal
import sys
import time

import prefork
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from launch import launch, results_of, scores_of
from safetensors.torch import load_file

import dsd_train
from conftest import ROOT
from custom_datasets import get_dataset
from diffusers_dsd import DSDError, DSDPipeline
from diffusers_dsd.prompts import WEIGHTS_NAME, read_attention_prompts
from diffusers_dsd.weighting import fit_attention_weight
from models import tiny_pipeline
from test_scoring import TEXTS, pictures
from trees import build_tree


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout among data folders, with made-up annotation files of a few rows."""
    _, data_dir = build_tree(tmp_path_factory.mktemp("tree"), items=60, reference=False)
    for script in ("dsd_train.py", "dsd_infer.py", "custom_datasets.py"):
        shutil.copy(ROOT / script, data_dir.parent)
    return data_dir.parent


TRAIN = ROOT / "dsd_train.py"
QUICK = ["--learning_rate", "1e-2", "--report_to", "none"]


def in_process(*args):
    """The script's own main, without starting Python anew."""
    old = sys.argv
    sys.argv = ["dsd_train.py", *map(str, args)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    AcceleratorState._reset_state(True)  # the run before, in this file or another, may have had another precision
    try:
        dsd_train.main()
    finally:
        sys.argv = old
        AcceleratorState._reset_state(True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def weights(folder):
    return load_file(folder / WEIGHTS_NAME)


def assert_same(one, two, atol=0.0):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "command",
    [
        "--train_batch_size 1 --val_batch_size 4 --train_data ComVG --val_data ComVG --num_train_epochs 2 "
        "--learning_rate 1e-4",
        "--train_batch_size 1 --val_batch_size 4 --bias --train_data ComVG --val_data ComVG_verb "
        "--num_train_epochs 1 --learning_rate 1e-4",
    ],
)
def test_the_commands_of_the_readme_run(checkout, model, tmp_path, command):
    done = launch(
        "dsd_train.py", "--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out",
        "--sampling_time_steps", "2", "--max_train_samples", "6", *command.split(), cwd=checkout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (final,) = (tmp_path / "out").glob("final-checkpoint-*")
    settings = json.loads((final / "dsd_settings.json").read_text())
    assert settings["score"] == ("attention" if "--bias" in command else "hybrid")
    assert settings["train_data"] == "ComVG" and settings["rank"] == 4 and settings["learning_rate"] == 1e-4
    val_data = command.split("--val_data ")[1].split()[0]
    results = results_of(tmp_path / "out" / f"results-{val_data}")
    assert settings["metrics"][val_data] == results["metrics"]
    assert len(scores_of(tmp_path / "out" / f"results-{val_data}")) == results["metrics"]["accuracy"]["n"]
    assert list((tmp_path / "out" / "logs").rglob("events.out.tfevents*")), "tensorboard is the default"

    # dsd_infer.py with this checkpoint gives the figures that the training ended with
    args = ["--val_data", val_data, "--model", model, "--output_dir", final, "--sampling_steps", 2]
    args += ["--results_dir", tmp_path / "again", *(["--bias"] if "--bias" in command else [])]
    prefork.run(args, tmp_path / "words", script=checkout / "dsd_infer.py")
    for one, two in zip(
        scores_of(tmp_path / "again"), scores_of(tmp_path / "out" / f"results-{val_data}"), strict=True
    ):
        torch.testing.assert_close(torch.tensor(one["scores"]), torch.tensor(two["scores"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("train_data", ["Refcocog", "vqa", "Shapes_text", "ShapesShift"])
def test_every_kind_of_training_data(checkout, model, tmp_path, train_data):
    in_process(
        "--model", model, "--train_data", train_data, "--output_dir", tmp_path, "--max_train_steps", 2,
        "--max_train_samples", 6, "--train_batch_size", 2, "--data_root", checkout.parent, *QUICK,
        *data_dir_is(checkout),
    )  # fmt: skip
    assert (tmp_path / "final-checkpoint-2" / WEIGHTS_NAME).is_file()


def data_dir_is(checkout):
    import custom_datasets

    custom_datasets.get_dataset.__kwdefaults__["data_dir"] = checkout / "data"
    return []


def test_a_checkpoint_loads_in_diffusers_and_changes_the_score(model, tmp_path):
    in_process("--model", model, "--output_dir", tmp_path, "--max_train_steps", 3, "--margin", 5, *QUICK)
    folder = tmp_path / "final-checkpoint-3"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [WEIGHTS_NAME, "dsd_settings.json", "training_state.pt"]
    )
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all
    drawing = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, local_files_only=True)
    drawing.load_lora_weights(folder)
    ours = DSDPipeline.from_pretrained(model)
    before = ours.score(pictures(2), TEXTS, sampling_steps=2).scores
    ours.load_attention_prompts(folder)
    after = ours.score(pictures(2), TEXTS, sampling_steps=2).scores
    assert (after - before).abs().max() > 1e-3
    theirs = DSDPipeline.from_pipe(drawing).score(pictures(2), TEXTS, sampling_steps=2).scores
    torch.testing.assert_close(theirs, after, atol=1e-5, rtol=0)
    assert len(read_attention_prompts(folder).state_dict) == 2 * 4 * 2 * 7


@pytest.mark.parametrize("score", ["hybrid", "attention"])
def test_batches_accumulation_and_checkpointing_give_the_same_weights(model, tmp_path, score):
    """4 items per step, however they are split."""
    ways = {
        "batch": ["--train_batch_size", 4],
        "accumulation": ["--train_batch_size", 1, "--gradient_accumulation_steps", 4, "--val_batch_size", 3],
        "checkpointing": ["--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--gradient_checkpointing"],
    }
    # SGD-like: with Adam's division by the gradient's own size, tiny differences of tiny gradients would grow
    args = ["--model", model, "--max_train_steps", 3, "--score", score, "--margin", 1, "--adam_epsilon", 1, *QUICK]
    for name, flags in ways.items():
        in_process(*args, *flags, "--output_dir", tmp_path / name)
    two = [*args, "--train_batch_size", 2, "--output_dir", tmp_path / "two"]
    prefork.run(two, tmp_path / "words", processes=2, script=TRAIN)
    reference = weights(tmp_path / "batch" / "final-checkpoint-3")
    for name in ("accumulation", "checkpointing", "two"):
        assert_same(weights(tmp_path / name / "final-checkpoint-3"), reference, atol=1e-5)
    up = [tensor.abs().max() for name, tensor in reference.items() if "lora_B" in name]
    assert max(up) > 1e-6, "something was learned"


def test_a_short_last_step_weighs_its_items_fully(model, tmp_path):
    """5 items, 2 per step: the third step of an epoch has one item, whose gradient is not halved. A sixth is kept."""
    args = ["--model", model, "--max_train_samples", 6, "--num_train_epochs", 1, "--adam_epsilon", 1, "--margin", 1]
    args += ["--fit_attention_weight", 1, "--sampling_time_steps", 2]  # one process has none of these items
    in_process(*args, *QUICK, "--train_batch_size", 2, "--output_dir", tmp_path / "one")
    assert (tmp_path / "one" / "final-checkpoint-3").is_dir()
    done = launch("dsd_train.py", *map(str, [*args, *QUICK]), "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert_same(
        weights(tmp_path / "one" / "final-checkpoint-3"), weights(tmp_path / "two" / "final-checkpoint-3"), 1e-5
    )
    fitted = [
        read_attention_prompts(tmp_path / name / "final-checkpoint-3").attention_weight for name in ("one", "two")
    ]
    assert fitted[0] == pytest.approx(fitted[1], rel=1e-3) and fitted[0] != 1


def test_bfloat16_keeps_the_prompts_in_float32(model, tmp_path):
    in_process("--model", model, "--output_dir", tmp_path, "--max_train_steps", 2, "--mixed_precision", "bf16", *QUICK)
    tensors = weights(tmp_path / "final-checkpoint-2")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors.values())


RESUMED = ["--max_train_steps", 12, "--checkpointing_steps", 2, "--train_batch_size", 2, "--lr_scheduler", "cosine"]


def start(model, output, *extra):
    """The training, in a process that can be killed, and the file with its words."""
    output.mkdir(exist_ok=True)
    words = output.parent / f"{output.name}.txt"
    args = ["--model", model, "--output_dir", output, *RESUMED, *QUICK, *extra]
    (process,) = prefork.start(args, words, script=TRAIN)
    return process, words


def finish(process, words):
    process.join(120)
    assert process.exitcode == 0, words.read_text()


def wait_until(condition, process, words, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), words.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    finish(*start(model, output))
    return weights(output / "final-checkpoint-12")


@pytest.mark.parametrize(
    "moment", [None, "Shapes-checkpoint-4", ".Shapes-checkpoint-6.tmp"], ids=["before the first", "after one", "within"]
)
def test_a_killed_run_resumes_bit_for_bit(model, tmp_path, uninterrupted, moment):
    output = tmp_path / "out"
    process, words = start(model, output)
    if moment is None:
        time.sleep(0.4)
    else:
        later = output / "Shapes-checkpoint-8"  # where the moment was too short to be seen
        wait_until(lambda: (output / moment).exists() or later.exists(), process, words)
    process.kill()
    process.join()
    assert not (output / "final-checkpoint-12").exists()
    finish(*start(model, output, "--resume_from_checkpoint", "latest"))
    assert_same(weights(output / "final-checkpoint-12"), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_with_a_sentence(model, tmp_path, uninterrupted, number):
    output = tmp_path / "out"
    process, words = start(model, output)
    wait_until(lambda: (output / "Shapes-checkpoint-2").exists(), process, words)
    os.kill(process.pid, number)
    process.join(60)
    error = words.read_text()
    assert process.exitcode == 128 + number
    assert "everything is saved" in error and "Traceback" not in error
    step = int(re.search(r"after step (\d+)", error)[1])
    assert (output / f"Shapes-checkpoint-{step}").is_dir()
    finish(*start(model, output, "--resume_from_checkpoint", "latest"))
    assert_same(weights(output / "final-checkpoint-12"), uninterrupted)


def test_only_the_newest_checkpoints_are_kept(model, tmp_path):
    in_process(
        "--model", model, "--output_dir", tmp_path, "--max_train_steps", 5, "--checkpointing_steps", 1,
        "--checkpoints_total_limit", 2, *QUICK,
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [
        "Shapes-checkpoint-4", "Shapes-checkpoint-5", "final-checkpoint-5",
    ]  # fmt: skip


def test_validation_keeps_the_best(model, tmp_path):
    in_process(
        "--model", model, "--output_dir", tmp_path, "--max_train_steps", 4, "--checkpointing_steps", 1,
        "--validation", "--validation_epochs", 2, "--use_validation_split", "--val_num", 6, "--max_train_samples", 20,
        "--sampling_time_steps", 2, *QUICK,
    )  # fmt: skip
    folders = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert folders == ["step-2", "step-4"], "every second checkpoint"
    values = {name: results_of(tmp_path / "validation" / name)["metrics"]["group_score"]["value"] for name in folders}
    best = json.loads((tmp_path / "best-checkpoint" / "dsd_settings.json").read_text())
    (figures,) = best["metrics"].values()
    assert figures["group_score"]["value"] == max(values.values()) and figures["group_score"]["n"] == 6
    first_best = min(name for name, value in values.items() if value == max(values.values()))
    assert f"step-{best['step']}" == first_best
    trained_on = {record["id"] for record in scores_of(tmp_path / "validation" / "step-2")}
    from custom_datasets import get_dataset

    items = get_dataset("Shapes", ".", mode="train")
    assert trained_on == {items.item(i).id for i in range(14, 20)}


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(model, tmp_path, capsys, monkeypatch):
    in_process("--model", model, "--output_dir", tmp_path, "--max_train_steps", 2, *QUICK)
    monkeypatch.setattr(dsd_train, "draw_timestep_and_noise", lambda *a: (5, torch.full((4, 8, 8), torch.nan)))
    with pytest.raises(SystemExit) as stop:
        in_process(
            "--model", model, "--output_dir", tmp_path, "--max_train_steps", 4, *QUICK, "--train_batch_size", 1,
            "--resume_from_checkpoint", "latest",
        )  # fmt: skip
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert re.search(r"loss of step 3 is not a finite number \(items (sub|obj|verb)-train-0-\d+ of Shapes\)", error)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["final-checkpoint-2"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train_data", "winoground"], "for evaluation only"),
        (["--train_data", "Shape"], "no benchmark 'Shape'"),
        (["--model", "no/such/model"], "no model folder"),
        (["--output_dir", "FILE/out"], "cannot be written"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--resolution", "15"], "resolution of 15"),
        (["--tokenizer", "nowhere"], "--tokenizer nowhere"),
        (["--mixed_precision", "fp16"], "fp16 needs a GPU"),
        (["--report_to", "comet_ml"], "pip install comet_ml"),
        (["--use_8bit_adam"], "pip install bitsandbytes"),
        (["--use_validation_split", "--validation", "--val_num", "5", "--max_train_samples", "5"], "leaves no item"),
        (["--fit_attention_weight", "5", "--max_train_samples", "5"], "leaves no item"),
        (["--sampling_time_steps", "0"], "--sampling_time_steps is 0"),
    ],
)
def test_bad_input_is_one_sentence(model, tmp_path, capsys, flags, words):
    (tmp_path / "FILE").write_text("")
    flags = [flag.replace("FILE", str(tmp_path / "FILE")) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        in_process("--model", model, "--output_dir", tmp_path / "out", "--report_to", "none", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and words in error and error.count("dsd_train.py: ") == 1
    assert not list(tmp_path.rglob("*checkpoint*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "0"], "not above 0"),
        (["--learning_rate", "-0.1"], "not a finite number"),
        (["--rank", "0"], "at least 1"),
        (["--bias", "--score", "hybrid"], "choose one of them"),
        (["--validation"], "needs held-out items"),
        (["--adam_beta1", "1.5"], "below 1"),
        (["--untuned_denoising"], "nothing of --score hybrid to train"),
        (["--fit_attention_weight", "-1"], "at least 0"),
    ],
)
def test_the_parser_refuses(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        dsd_train.parse_args(flags)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_resuming_another_training_is_refused(model, tmp_path, capsys):
    in_process("--model", model, "--output_dir", tmp_path, "--max_train_steps", 1, *QUICK)
    for flags, words in (
        (["--resume_from_checkpoint", "latest", "--rank", "8"], "rank 4, not 8"),
        (["--resume_from_checkpoint", "latest", "--model", str(model) + "/"], "pretrained_model_name_or_path"),
        (["--resume_from_checkpoint", "latest", "--train_batch_size", "2"], "items_per_step 1, not 2"),
        ([], "holds checkpoints of an earlier training"),
    ):
        with pytest.raises(SystemExit):
            in_process("--model", model, "--output_dir", tmp_path, "--max_train_steps", 2, *QUICK, *flags)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "final-checkpoint-2").exists()


def test_the_model_card_and_the_upload(model, tmp_path, monkeypatch, checkout):
    """The network is a stand-in; everything before it is real."""
    import huggingface_hub

    calls = []

    class Uploads(huggingface_hub.HfApi):
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, self.token))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], sorted(path.name for path in options["folder_path"].iterdir())))
            calls.append(options["ignore_patterns"])

    monkeypatch.setattr("diffusers_dsd.hub.HfApi", Uploads)
    in_process(
        "--model", model, "--train_data", "ComVG", "--val_data", "ComVG", "--data_root", checkout.parent,
        "--output_dir", tmp_path / "out", "--max_train_samples", 6, "--max_train_steps", 1,
        "--sampling_time_steps", 1, "--push_to_hub",
        "--hub_model_id", "prompts", "--hub_token", "hf_secret", *QUICK, *data_dir_is(checkout),
    )  # fmt: skip
    final = tmp_path / "out" / "final-checkpoint-1"
    assert calls[0] == ("create", "prompts", "hf_secret")
    assert calls[1][:2] == ("upload", "someone/prompts") and "README.md" in calls[1][2]
    assert calls[2] == ["training_state.pt"]
    card = (final / "README.md").read_text()
    figure = json.loads((final / "dsd_settings.json").read_text())["metrics"]["ComVG"]["accuracy"]
    assert f"| ComVG | accuracy | {figure['value']:.3f} |" in card
    for words in (f"base_model: {model}", "- `train_data`: ComVG", "- `rank`: 4", 'score="hybrid", halves="cond"'):
        assert words in card
    assert "hf_secret" not in card + (final / "dsd_settings.json").read_text()

    def refuse(self, repo_id, **options):
        raise OSError("no network")

    monkeypatch.setattr(Uploads, "create_repo", refuse)
    from diffusers_dsd.hub import model_card, push_to_hub

    with pytest.raises(DSDError, match="was not uploaded"):
        settings = json.loads((final / "dsd_settings.json").read_text())
        push_to_hub(final, "prompts", model_card("prompts", settings, {}))
    assert (final / WEIGHTS_NAME).is_file()


def test_the_weight_of_the_attention_term_is_learned_from_items_kept_apart(model, tmp_path):
    """The noted weight is the fit on the last training items, and an evaluation of the checkpoint uses it."""
    in_process(
        "--model", model, "--train_data", "Shapes", "--max_train_samples", 12, "--fit_attention_weight", 5,
        "--untuned_denoising", "--score", "attention", "--max_train_steps", 3, "--sampling_time_steps", 2,
        "--output_dir", tmp_path / "out", *QUICK,
    )  # fmt: skip
    settings = json.loads((tmp_path / "out" / "final-checkpoint-3" / "dsd_settings.json").read_text())
    pipe = DSDPipeline.from_pretrained(model)
    pipe.load_attention_prompts(tmp_path / "out" / "final-checkpoint-3")
    assert pipe.resolve_attention_weight(None) == settings["attention_weight"]
    assert pipe.resolve_untuned_denoising(None) is settings["untuned_denoising"] is True
    data = get_dataset("Shapes", ROOT.parent, resize=16, mode="train")
    attention, denoising = [], []
    for index in range(7, 12):
        out = pipe.score(data[index].images, data[index].texts, sampling_steps=2)
        for i, j in ((0, 1), (1, 0)):
            places = [(i, i), (i, j), (j, i)]
            attention.append([float(out.attention[place]) for place in places])
            denoising.append([float(out.denoising[place]) for place in places])
    assert settings["attention_weight"] == pytest.approx(fit_attention_weight(attention, denoising), rel=1e-2, abs=1e-3)
    args = ["--model", model, "--val_data", "Shapes_sub", "--limit", 2, "--sampling_time_steps", 2]
    args += ["--output_dir", tmp_path / "out" / "final-checkpoint-3", "--results_dir", tmp_path / "results"]
    prefork.run(args, tmp_path / "words")
    noted = results_of(tmp_path / "results")["settings"]
    assert (noted["attention_weight"], noted["untuned_denoising"]) == (settings["attention_weight"], True)
