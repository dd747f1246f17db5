"""demo.ipynb runs from top to bottom, and the copy in the repository shows what it gave."""

import os

import nbformat
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOK = ROOT / "demo.ipynb"
SMALLER = {"--limit 100": "--limit 10", "--max_train_steps 80": "--max_train_steps 4"}  # the same cells in less time


def pictures_and_tables(notebook) -> list[str]:
    kinds = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            kinds += [kind for kind in ("image/png", "text/html") if kind in output.get("data", {})]
    return kinds


def test_it_runs_and_gives_what_its_saved_copy_shows(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = pictures_and_tables(notebook)
    assert saved.count("image/png") >= 6 and saved.count("text/html") >= 6
    for name in ("dsd_infer.py", "dsd_train.py", "custom_datasets.py", "assets"):  # what it leaves stays in tmp_path
        (tmp_path / name).symlink_to(ROOT / name)
    for long, short in SMALLER.items():
        (cell,) = (cell for cell in notebook.cells if long in cell.source)
        cell.source = cell.source.replace(long, short)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures_and_tables(notebook) == saved
    assert list(tmp_path.glob("results/notebook-*/tuned/results.json"))


def test_its_one_variable_chooses_the_model():
    first = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    assert first.source.splitlines()[0].startswith('MODEL = "shapes-sd"') and len(first.source.splitlines()) == 1
