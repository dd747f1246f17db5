"""The results folder: nothing lost, nothing twice, nothing half-written."""

import json
import os
import resource
import tracemalloc
from contextlib import contextmanager

import pytest

from diffusers_dsd import DSDError
from diffusers_dsd.results import (
    SCORES_NAME,
    ResultsFolder,
    find_results,
    load_records,
    versions,
    write_json,
    write_text,
)

SETTINGS = {"model": "tiny", "seed": 0, "checkpoint": None}


def record(index):
    return {"index": index, "id": f"item-{index}", "scores": [[0.1 * index, 1.0]], "texts": ["à “b”"]}


def filled(path, shards, count=7):
    folder = ResultsFolder(path, SETTINGS)
    for index in range(count):
        folder.append(record(index), shard=index % shards)
    return folder


def done(folder, total=7):
    return [index for index, is_done in enumerate(folder.done(total)) if is_done]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_come_together_in_order(tmp_path, shards):
    folder = filled(tmp_path / "out", shards)
    assert done(folder) == list(range(7))
    folder.merge(7)
    assert list(load_records(tmp_path / "out" / SCORES_NAME)) == [record(i) for i in range(7)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [SCORES_NAME, "settings.json"]


def test_a_killed_run_is_continued_by_another_number_of_processes(tmp_path):
    filled(tmp_path, 3, count=4)
    again = ResultsFolder(tmp_path, SETTINGS)
    assert done(again) == [0, 1, 2, 3]
    for index in range(7):
        if not again.done(7)[index]:
            again.append(record(index), shard=0)
    again.merge(7)
    assert list(load_records(tmp_path / SCORES_NAME)) == [record(i) for i in range(7)]


def test_a_kill_between_merging_and_removing_the_shards_counts_nothing_twice(tmp_path):
    folder = filled(tmp_path, 2)
    shards = {path: path.read_bytes() for path in tmp_path.glob("scores-*")}
    folder.merge(7)
    for path, content in shards.items():
        path.write_bytes(content)
    again = ResultsFolder(tmp_path, SETTINGS)
    assert len(done(again)) == 7
    again.merge(7)
    assert list(load_records(tmp_path / SCORES_NAME)) == [record(i) for i in range(7)]


def test_a_last_line_cut_anywhere_is_dropped_and_written_again(tmp_path):
    whole = filled(tmp_path / "whole", 1, count=2)
    shard = (whole.path / "scores-00000.jsonl").read_bytes()
    first = shard.index(b"\n") + 1
    for cut in range(first, len(shard)):
        path = tmp_path / f"cut-{cut}"
        folder = ResultsFolder(path, SETTINGS)
        (path / "scores-00000.jsonl").write_bytes(shard[:cut])
        assert done(folder) == [0]
        folder.append(record(1), shard=0)
        folder.merge(2)
        assert list(load_records(path / SCORES_NAME)) == [record(0), record(1)]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_half_line_in_a_shard_that_nobody_continues_is_dropped(tmp_path, shards):
    filled(tmp_path, 3, count=3)
    shard = tmp_path / "scores-00002.jsonl"
    shard.write_bytes(shard.read_bytes()[:-5])
    again = ResultsFolder(tmp_path, SETTINGS)
    assert done(again) == [0, 1]
    for index in range(2, 7):
        again.append(record(index), shard=index % shards)
    again.merge(7)
    assert list(load_records(tmp_path / SCORES_NAME)) == [record(i) for i in range(7)]


def test_each_record_can_be_read_while_the_writer_is_still_open(tmp_path):
    folder = ResultsFolder(tmp_path, SETTINGS)
    for index in range(3):
        folder.append(record(index), shard=0)
        assert len(list(load_records(tmp_path / "scores-00000.jsonl"))) == index + 1


def test_texts_that_are_not_unicode_come_back_as_they_were(tmp_path):
    settings = SETTINGS | {"model": "caf\udce9"}  # what Python makes of a Latin-1 file name
    folder = ResultsFolder(tmp_path, settings)
    folder.append(record(0) | {"texts": ["\udce9", "\u2028", "😀"]}, shard=0)
    ResultsFolder(tmp_path, settings).merge(1)
    assert next(load_records(tmp_path / SCORES_NAME))["texts"] == ["\udce9", "\u2028", "😀"]


def test_other_settings_are_refused_by_the_first_difference(tmp_path):
    filled(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DSDError, match=r"seed was 0 and is now 1\): choose another --results_dir"):
        ResultsFolder(tmp_path, SETTINGS | {"seed": 1})
    with pytest.raises(DSDError, match="checkpoint was None and is now 'x'"):
        ResultsFolder(tmp_path, SETTINGS | {"checkpoint": "x"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_items_are_said_and_no_shard_is_lost(tmp_path):
    """What the main process sees where the other machine writes to a disk of its own."""
    folder = ResultsFolder(tmp_path, SETTINGS)
    for index in (0, 2, 4):
        folder.append(record(index), shard=0)
    with pytest.raises(DSDError, match=r"holds 3 of 5 items.*that all machines share"):
        folder.merge(5)
    assert not (tmp_path / SCORES_NAME).exists() and done(folder) == [0, 2, 4]
    for index in (1, 3):  # the other machine's shard is copied into the folder
        folder.append(record(index), shard=1)
    folder.merge(5)
    assert list(load_records(tmp_path / SCORES_NAME)) == [record(i) for i in range(5)]


def test_an_item_that_the_benchmark_does_not_have_is_refused(tmp_path):
    folder = filled(tmp_path, 1)
    with pytest.raises(DSDError, match=r"scores-00000\.jsonl holds item 5, but the benchmark has 5 items now"):
        folder.done(5)
    with pytest.raises(DSDError, match="has 5 items now"):
        folder.merge(5)


def test_the_newest_folder_of_the_same_settings_is_found(tmp_path):
    with pytest.raises(DSDError, match=r"--resume: there is nothing to resume in .*: leave --resume out"):
        find_results(tmp_path, SETTINGS)
    for age, (name, seed) in enumerate([("c", 1), ("a", 0), ("b", 0), ("d", 1)]):
        ResultsFolder(tmp_path / name, SETTINGS | {"seed": seed})
        os.utime(tmp_path / name / "settings.json", (1000 - age, 1000 - age))
    assert find_results(tmp_path, SETTINGS) == tmp_path / "a"
    with pytest.raises(DSDError, match=r"in the newest folder, c, seed was 1 and is now 2\)"):
        find_results(tmp_path, SETTINGS | {"seed": 2})


def test_what_is_kept_of_each_item_while_merging_is_small(tmp_path):
    """Twelve bytes per item, so that 100,000 more items are about a megabyte."""
    folder = ResultsFolder(tmp_path, SETTINGS)
    peaks = []
    for count in (1000, 6000):
        lines = (json.dumps(record(index)) + "\n" for index in range(count))
        (tmp_path / "scores-00000.jsonl").write_text("".join(lines))
        tracemalloc.start()
        assert all(folder.done(count))
        folder.merge(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        (tmp_path / SCORES_NAME).unlink()
    assert peaks[1] - peaks[0] < 5000 * 16


def test_scores_of_unknown_settings_and_damaged_lines_are_refused(tmp_path):
    (tmp_path / SCORES_NAME).write_text("{}\n")
    with pytest.raises(DSDError, match=r"without settings\.json"):
        ResultsFolder(tmp_path, SETTINGS)
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\nnot json\n{"id": "b"}\n')
    with pytest.raises(DSDError, match=r"Line 2 of .*bad\.jsonl"):
        list(load_records(tmp_path / "bad.jsonl"))
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(DSDError, match=r"settings\.json cannot be read"):
        ResultsFolder(tmp_path, SETTINGS)


def test_nan_is_never_written(tmp_path):
    folder = ResultsFolder(tmp_path, SETTINGS)
    with pytest.raises(DSDError, match="item-3"):
        folder.append(record(3) | {"scores": [[float("nan")]]}, shard=0)
    assert not done(folder)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DSDError, match=r"file/out/settings.json cannot be written"):
        ResultsFolder(tmp_path / "file" / "out", SETTINGS)
    with pytest.raises(DSDError, match="File name too long"):
        ResultsFolder(tmp_path / ("a" * 300), SETTINGS)


def test_a_shard_that_cannot_be_read_is_one_sentence(tmp_path):
    folder = filled(tmp_path, 1)
    (tmp_path / "scores-00001.jsonl").mkdir()
    with pytest.raises(DSDError, match=r"scores-00001\.jsonl cannot be read"):
        folder.done(7)
    with pytest.raises(DSDError, match=r"scores-00001\.jsonl cannot be read"):
        folder.merge(7)


@contextmanager
def small_disk():
    """Writing a file beyond 1000 bytes fails, as on a full disk (pytest's own log too, so keep it short)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    count = 30
    with pytest.raises(DSDError, match=r"scores-00000\.jsonl cannot be written"), small_disk():
        filled(tmp_path, 1, count)
    folder = ResultsFolder(tmp_path, SETTINGS)
    before = done(folder, count)
    assert 5 < len(before) < count and before == list(range(len(before)))
    for index in range(len(before), count):
        folder.append(record(index), shard=1)
    with pytest.raises(DSDError, match=r"scores\.jsonl cannot be written"), small_disk():
        folder.merge(count)
    assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / SCORES_NAME).exists()
    folder.merge(count)
    assert list(load_records(tmp_path / SCORES_NAME)) == [record(i) for i in range(count)]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_json(target, {"n": 1})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DSDError, match="No space left on device"):
        write_text(target, "half")
    assert json.loads(target.read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_two_machines_with_the_same_process_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    fsync = os.fsync

    def while_another_writes(descriptor):
        monkeypatch.setattr("os.fsync", fsync)
        write_text(tmp_path / "a.json", "same")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", while_another_writes)
    write_text(tmp_path / "a.json", "same")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["same"]


def test_versions_name_the_packages_and_the_machine():
    assert {"torch", "diffusers", "diffusers_dsd", "python", "machine"} <= set(versions())
