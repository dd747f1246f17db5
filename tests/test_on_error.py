"""`--on_error skip`: what cannot be scored is written down, counted, and left out of the figures."""

import json
import math
import shutil
from collections import Counter

import prefork
import pytest
import torch
from launch import launch, results_of, scores_of
from test_infer import checkout  # noqa: F401 - a fixture

import dsd_infer
from assets import terms_table
from custom_datasets import get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.playground_results import read_results

ARGS = ["--val_data", "ComVG", "--model", "tiny", "--limit", "6", "--sampling_steps", "1"]
BROKEN, MISSING = 2, 3  # indices of items; processes take every second one


@pytest.fixture(scope="module")
def broken(checkout, tmp_path_factory):  # noqa: F811
    """A picture that ends too early and one that is not there, and an evaluation that skipped them."""
    items = get_dataset("ComVG", checkout.parent, data_dir=checkout / "data")
    whole = tmp_path_factory.mktemp("whole")
    prefork.run([*ARGS, "--results_dir", whole], whole.parent / "words", script=checkout / "dsd_infer.py")
    used = Counter(path for index in range(6) for path in items[index].images)
    paths = {index: min(items[index].images, key=used.__getitem__) for index in (BROKEN, MISSING)}
    assert all(used[path] == 1 for path in paths.values()), "other items have these pictures too"
    before = {path: path.read_bytes() for path in paths.values()}
    paths[BROKEN].write_bytes(before[paths[BROKEN]][:-200])
    paths[MISSING].unlink()
    folder = tmp_path_factory.mktemp("skipped")
    done = launch("dsd_infer.py", *ARGS, "--on_error", "skip", "--results_dir", folder, cwd=checkout, processes=2)
    assert done.returncode == 0, done.stderr
    yield paths, whole, folder, done.stdout
    for path, content in before.items():
        path.write_bytes(content)


def test_the_record_says_why_and_the_figures_are_over_the_others(broken):
    paths, whole, folder, printed = broken
    records, undisturbed = scores_of(folder), scores_of(whole)
    assert [record["index"] for record in records] == list(range(6))
    for record, other in zip(records, undisturbed, strict=True):
        assert record["id"] == other["id"]
        if path := paths.get(record["index"]):
            assert set(record) == {"index", "id", "error"} and str(path) in record["error"]
        else:  # among them those that were to be scored together with the damaged picture
            torch.testing.assert_close(torch.tensor(record["scores"]), torch.tensor(other["scores"]))
    results = results_of(folder)
    assert results["skipped"] == 2
    assert results["skipped_reasons"] == [records[BROKEN]["error"], records[MISSING]["error"]]
    assert results["metrics"]["accuracy"]["n"] == 4 and results_of(whole)["skipped"] == 0
    assert "Skipped 2 items" in printed and records[BROKEN]["error"] in printed


def test_a_resumed_run_neither_retries_nor_counts_twice(broken, checkout, tmp_path):  # noqa: F811
    paths, _, folder, _ = broken
    shutil.copytree(folder, tmp_path / "out")
    records = scores_of(folder)
    lines = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "scores.jsonl").write_text("".join(lines[:5]))  # the last item is still to be scored
    shutil.copy(paths[MISSING].with_name(f"{records[0]['images'][0]}.jpg"), paths[MISSING])  # there is a picture now
    args = [*ARGS, "--on_error", "skip", "--results_dir", tmp_path / "out"]
    prefork.run(args, tmp_path / "words", script=checkout / "dsd_infer.py")
    assert [r.get("error") for r in scores_of(tmp_path / "out")] == [r.get("error") for r in records]
    for name in ("metrics", "skipped", "skipped_reasons"):
        assert results_of(tmp_path / "out")[name] == results_of(folder)[name]
    paths[MISSING].unlink()


def test_another_annotation_file_is_not_gone_on_with(broken, checkout, tmp_path):  # noqa: F811
    shutil.copytree(broken[2], tmp_path / "out")
    table = checkout / "data" / "compositional_visual_genome.csv"
    before = table.read_bytes()
    table.write_bytes(before.replace(b"1,", b"1, ", 1))
    try:
        args = [*ARGS, "--on_error", "skip", "--results_dir", tmp_path / "out"]
        said = prefork.run(args, tmp_path / "words", script=checkout / "dsd_infer.py", status=1)
    finally:
        table.write_bytes(before)
    assert "results of other settings (annotations_sha256 was " in said


def test_what_reads_results_copes_with_skipped_items(broken):
    _, _, folder, _ = broken
    results = read_results(folder.parent, folder.name, most_wrong=9)
    assert len(results.margins) == results.figures["accuracy"]["n"] == 4
    assert terms_table.right_and_total(folder, "scores")[1] == 4


def infer(monkeypatch, capsys, folder, *args):
    """dsd_infer.py in this process: its status, and what it said."""
    monkeypatch.setattr("sys.argv", ["dsd_infer.py", *args, "--on_error", "skip", "--results_dir", str(folder)])
    status = 0
    try:
        dsd_infer.main()
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr()


def test_a_score_that_is_not_a_number_is_skipped_alone(tmp_path, monkeypatch, capsys):
    score_items = DSDPipeline.score_items

    def with_nan(self, items, **arguments):
        outputs = score_items(self, items, **arguments)
        outputs[1].scores[0, 0] = math.nan
        return outputs

    monkeypatch.setattr(DSDPipeline, "score_items", with_nan)
    status, _ = infer(monkeypatch, capsys, tmp_path, "--limit", "3", "--sampling_steps", "1", "--batchsize", "99")
    assert status == 0
    assert [("error" in record, "scores" in record) for record in scores_of(tmp_path)] == [
        (False, True), (True, False), (False, True),
    ]  # fmt: skip
    assert "is not a number" in results_of(tmp_path)["skipped_reasons"][0]


@pytest.mark.parametrize("more", [(), ("--adaptive", "0.9")], ids=["full grid", "races"])
def test_where_nothing_can_be_scored_one_sentence_says_so(tmp_path, monkeypatch, capsys, more):
    load = dsd_infer.load

    def load_with_nan(*args):
        pipe, benchmark = load(*args)
        torch.nn.init.constant_(pipe.unet.conv_in.weight, math.nan)
        return pipe, benchmark

    monkeypatch.setattr(dsd_infer, "load", load_with_nan)
    for _ in range(2):  # and says so again when it is started again
        status, said = infer(monkeypatch, capsys, tmp_path, "--limit", "2", "--sampling_steps", "5", *more)
        assert status == 1 and said.err.count("dsd_infer.py: All 2 items of Shapes were skipped") == 1
        assert str(tmp_path) in said.err and "not a number" in said.err
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all("error" in record for record in records)
