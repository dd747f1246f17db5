"""The table of the score and its terms, from results folders."""

import json

import numpy as np
import pytest

from assets import terms_table


def write_results(folder, rights: dict[str, list[bool]], label: int | None = 0):
    folder.mkdir()
    lines = []
    for index in range(len(rights["scores"])):
        terms = {name: [[1.0], [0.0]] if rights[name][index] else [[0.0], [0.0]] for name in rights}  # a tie is wrong
        lines.append(json.dumps({"id": str(index), "index": index, "label": label, "denoising": None} | terms))
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def table(monkeypatch, capsys):
    """The table of these folders as printed; or the exit status and what was said."""

    def run(*folders):
        monkeypatch.setattr("sys.argv", ["terms_table.py", *map(str, folders)])
        try:
            terms_table.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


def test_shares_intervals_and_their_mean(table, tmp_path):
    one = write_results(tmp_path / "one", {"scores": [True] * 60 + [False] * 40, "attention": [True] * 100})
    two = write_results(tmp_path / "two", {"scores": [True] * 160 + [False] * 40, "attention": [False] * 200})
    status, printed = table(one, two)
    assert status == 0, printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert rows[0] == ["results", "n", "attention", "denoising", "score"]
    assert rows[2][:2] == ["one", "100"] and rows[2][2].startswith("1.000 (.9") and rows[2][3] == ""
    assert rows[2][4].startswith(".600 (.5") and rows[3][4].startswith(".800 (.7")
    assert rows[4][0] == "mean" and rows[4][4].startswith(".700 (") and rows[4][2].startswith(".500 (")
    low, high = (float(number) for number in rows[4][4][6:-1].split(" - "))
    deviation = np.sqrt(0.6 * 0.4 / 100 + 0.8 * 0.2 / 200) / 2
    assert (low, high) == pytest.approx((0.7 - 1.96 * deviation, 0.7 + 1.96 * deviation), abs=0.006)


def test_what_has_no_accuracy_is_refused(table, tmp_path):
    folder = write_results(tmp_path / "pairs", {"scores": [True], "attention": [True]}, label=None)
    for path, words in ((folder, "has no accuracy"), (tmp_path / "nowhere", "cannot be read")):
        status, said = table(path)
        assert status == 1 and words in said
