"""playground.py, started as users start it and used through gradio_client and plain HTTP."""

import json
import os
import pickle
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from conftest import GOLDEN, ROOT
from custom_datasets import get_dataset
from diffusers_dsd import DSDPipeline
from diffusers_dsd.metrics import item_outcomes, summarise
from diffusers_dsd.models import SHAPES_SD
from diffusers_dsd.playground_html import matrix_table, wrong_item
from diffusers_dsd.playground_results import margin
from diffusers_dsd.shapes import shapes_item

pytestmark = pytest.mark.xdist_group("playground")  # one worker, so that one server is enough
LONG = "\n".join(f"a red circle left of a blue square {i}" for i in range(32))


class Server:
    """A playground that runs in a process of its own."""

    def __init__(self, process: subprocess.Popen, port: int, temporary: Path) -> None:
        self.process, self.url, self.temporary = process, f"http://127.0.0.1:{port}", temporary
        self.output: list[str] = []

    def client(self) -> Client:
        return Client(self.url, verbose=False)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"{self.url}/{path}", timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def launch(*flags: str, port: int, temporary: Path) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "playground.py"), "--server_port", str(port), *map(str, flags)],
        cwd=temporary,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(*flags: str) -> Iterator[Server]:
    """A playground that answers; ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = Server(launch(*flags, port=port, temporary=Path(folder)), port, Path(folder))
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in server.process.stdout:
                server.output.append(line)
                lines.put(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while "The playground is at" not in lines.get(timeout=120):
                pass
            yield server
        finally:
            server.process.terminate()
            server.process.wait(timeout=30)
            reader.join(timeout=10)


def write_results(folder: Path) -> None:
    """Two evaluations as dsd_infer.py writes them, with made-up scores; a third is a link to outside."""
    shapes = get_dataset("Shapes_sub", ROOT, seed=1)
    records = []
    for index in range(20):
        item = shapes[index]
        right = 1.0 if index % 4 else -1.0 - index
        records.append(
            (item.id, item.texts, item.image_ids, item.label, [[right if i == item.label else 0.25] for i in (0, 1)])
        )
    _write(folder / "run" / "Shapes_sub", "accuracy", "Shapes_sub", records)
    texts = ["<b>a dog</b> bites a man", "a man bites a dog"]
    _write(folder / "wino", "winoground", "winoground", [("7", texts, ["x", "y"], None, [[2.0, 1.0], [0.5, 0.75]])])
    outside = folder.parent / "outside"
    _write(outside, "winoground", "winoground", [("7", texts, ["x", "y"], None, [[2.0, 1.0], [0.5, 0.75]])])
    (folder / "link").mkdir()
    for file in ("scores.jsonl", "results.json"):
        (folder / "link" / file).symlink_to(outside / file)


def _write(folder: Path, metric: str, benchmark: str, records: list[tuple]) -> None:
    folder.mkdir(parents=True)
    with (folder / "scores.jsonl").open("w") as file:
        for index, (name, texts, images, label, scores) in enumerate(records):
            record = {"index": index, "id": name, "label": label, "texts": texts, "images": images, "scores": scores}
            file.write(json.dumps(record) + "\n")
    figures = summarise((item_outcomes(metric, scores, label), {}) for _, _, _, label, scores in records)
    settings = {"val_data": benchmark, "model": "shapes-sd", "score": "denoising", "seed": 1}
    (folder / "results.json").write_text(json.dumps({"metrics": figures, "settings": settings}))


@contextmanager
def running_with_results(folder: Path) -> Iterator[Server]:
    """The playground with a results folder to show."""
    write_results(folder / "results")
    with running("--results_dir", folder / "results") as server:
        yield server


def draw_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """Two scenes of opposite relations, and their sentences."""
    item = shapes_item("verb", 0, size=128)
    files = [folder / "one.png", folder / "two.png"]
    for image, file in zip(item.images, files, strict=True):
        image.save(file)
    return files, [scene.sentence for scene in item.scenes]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with running_with_results(tmp_path_factory.mktemp("pages")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Client:
    return server.client()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[list[Path], list[str]]:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def send(client: Client, files: list[Path], texts: str, checkpoint: str = "none", **settings) -> dict:
    files = [handle_file(str(file)) for file in files]
    return client.predict(images=files, texts=texts, checkpoint=checkpoint, api_name="/score", **settings)


# ---- what it answers


def test_score_answers_what_the_pipeline_computes(client, pictures):
    files, sentences = pictures
    pipe = DSDPipeline.from_pretrained(SHAPES_SD, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    answer = send(client, files, "\n".join([*sentences, "", "  "]))
    expected = pipe.score([str(f) for f in files], sentences, sampling_steps=10, score="denoising")
    assert answer["scores"] == [pytest.approx(row, abs=1e-4) for row in expected.scores.tolist()]
    assert answer["images"] == ["one.png", "two.png"] and answer["texts"] == sentences
    assert answer["score"] == "denoising" and len(answer["timesteps"]) == 10 and answer["seconds"] > 0
    assert answer["scores"][0][0] > answer["scores"][0][1] and answer["scores"][1][1] > answer["scores"][1][0]

    hybrid = send(client, files, sentences[0], score="hybrid", sampling_steps=3, seed=5)
    expected = pipe.score([str(f) for f in files], sentences[0], sampling_steps=3, seed=5)
    for term in ("scores", "attention", "denoising"):
        assert hybrid[term] == [pytest.approx(row, abs=1e-4) for row in getattr(expected, term).tolist()]

    attention = send(client, files, sentences[0], score="attention", sampling_steps=3, seed=5)
    assert attention["scores"] == [pytest.approx(row, abs=1e-4) for row in expected.attention.tolist()]
    assert attention["denoising"] is None


def test_explain_answers_a_map_for_every_word(client, pictures):
    answer = client.predict(image=handle_file(str(pictures[0][0])), text="a red star", api_name="/explain")
    assert answer["words"] == ["a", "red", "star"]
    assert sum(answer["shares"]) == pytest.approx(1)
    assert len(answer["maps"]) == 3 and len(answer["maps"][0]) == len(answer["maps"][0][0]) > 1


def test_another_model_and_checkpoint_can_be_chosen_and_left(client, pictures):
    files, sentences = pictures
    settings = {"score": "hybrid", "sampling_steps": 1}
    tiny, legacy = str(GOLDEN / "tiny-sd"), str(GOLDEN / "lora-legacy")
    before = send(client, files[:1], sentences[0], **settings)["scores"]
    plain = send(client, files[:1], sentences[0], model=tiny, **settings)["scores"]
    tuned = send(client, files[:1], sentences[0], model=tiny, checkpoint=legacy, **settings)["scores"]
    again = send(client, files[:1], sentences[0], model=tiny, **settings)["scores"]
    assert plain == again and plain != tuned and plain != before
    with pytest.raises(AppError, match="checkpoint"):
        send(client, files[:1], sentences[0], checkpoint=legacy, **settings)  # it belongs to the other model
    assert send(client, files[:1], sentences[0], **settings)["scores"] == before


def test_two_visitors_get_their_own_answers(server, pictures):
    files, sentences = pictures
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda i: send(server.client(), [files[i]], sentences[i]), range(2)))
    for i, answer in enumerate(answers):
        assert answer["texts"] == [sentences[i]] and answer["images"] == [files[i].name]
        assert answer["scores"][0][0] > 0


def test_benchmark_shows_figures_and_wrong_items_with_their_pictures(client):
    figures, histogram, wrong = client.predict(folder="run/Shapes_sub", api_name="/benchmark")
    assert "accuracy" in figures and "0.750" in figures and "seed 1" in figures
    assert histogram["plot"].startswith("data:image/png")
    assert wrong.count('class="dsd-item"') == 5 and wrong.count("<img") == 10
    assert wrong.index("sub-test-1-16") < wrong.index("sub-test-1-12")  # the lowest margin first


def test_benchmark_without_pictures_shows_texts_and_scores(client):
    _, _, wrong = client.predict(folder="wino", api_name="/benchmark")
    assert "<img" not in wrong and "--data_root" in wrong
    assert "&lt;b&gt;a dog&lt;/b&gt; bites a man" in wrong and "+0.750" in wrong


# ---- what it refuses


def _broken(kind: str, folder: Path, good: Path) -> Path:
    file = folder / f"{kind}.png"
    if kind == "truncated":
        file.write_bytes(good.read_bytes()[:-200])
    elif kind == "text":
        file.write_text("not a picture")
    elif kind == "huge":
        Image.new("1", (20000, 20000)).save(file)
    elif kind == "large":
        Image.new("1", (5200, 5000)).save(file)
    elif kind == "postscript":  # Pillow would start another program to read it
        file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return file


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", "truncated.png cannot be read as a picture"),
        ("text", "text.png cannot be read as a picture"),
        ("huge", "huge.png has more than 25,000,000 pixels"),
        ("large", "large.png has more than 25,000,000 pixels"),
        ("postscript", "postscript.png cannot be read as a picture"),
    ],
)
def test_a_bad_picture_is_refused_in_a_sentence(client, pictures, tmp_path, kind, sentence):
    with pytest.raises(AppError, match=re.escape(sentence)) as error:
        send(client, [_broken(kind, tmp_path, pictures[0][0])], "a red circle")
    assert "/" not in str(error.value)  # where the server keeps uploads


@pytest.mark.parametrize(
    ("images", "texts", "settings", "sentence"),
    [
        (17, "a", {}, "These are 17 pictures: give at most 16."),
        (0, "a", {}, "There is no picture"),
        (1, " \n ", {}, "There is no sentence"),
        (1, "a\n" * 33, {}, "These are 33 sentences: give at most 32."),
        (1, "a" * 1001, {}, "Sentence 1 has 1,001 characters"),
        (1, "a", {"sampling_steps": 201}, "200"),
        (1, "a", {"sampling_steps": 1.5}, "give a whole number from 1 to 200"),
        (1, "a", {"seed": -1}, "The seed is -1: give a whole number"),
        (1, "a", {"model": "/nowhere"}, "There is no model folder /nowhere"),
        (1, "a", {"checkpoint": "/etc/passwd"}, "/etc/passwd is refused"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(client, pictures, images, texts, settings, sentence):
    with pytest.raises(AppError, match=re.escape(sentence)):
        send(client, pictures[0][:1] * images, texts, **settings)


def test_a_large_file_is_refused_before_it_is_stored(server):
    # not through gradio_client, which would refuse to send it
    answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("heavy.png", bytes(21 * 1024 * 1024))})
    assert answer.status_code == 413
    assert not list(server.temporary.rglob("heavy.png"))


def test_a_checkpoint_that_would_run_a_program_does_not(client, pictures, tmp_path):
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "was here"),)

    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(AppError, match="is refused"):
        send(client, pictures[0][:1], "a", checkpoint=str(file))
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("folder", ["../outside", "/etc", "run", "run/../wino", "link", "nothing", "\0"])
def test_results_are_read_from_the_results_folder_only(client, folder):
    with pytest.raises(AppError, match=r"There are no results|link to somewhere else"):
        client.predict(folder=folder, api_name="/benchmark")


def test_files_of_the_server_are_not_served(server, client, pictures, tmp_path_factory):
    uploaded = client.predict(images=[handle_file(str(pictures[0][0]))], texts="a", sampling_steps=1, api_name="/score")
    assert uploaded["images"] == ["one.png"]
    uploads = next(server.temporary.glob("dsd-playground-*"))
    mine = next(uploads.rglob("one.png"))
    assert server.get(f"gradio_api/file={mine}")[0] == 200  # the same request of an upload is answered
    results = next(tmp_path_factory.getbasetemp().glob("pages*/results/wino/scores.jsonl"))
    for path in (
        "/etc/passwd",
        f"{mine.parent}/../../../../../../../../etc/passwd",
        f"{mine.parent}/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        str(ROOT / "README.md"),
        "playground.py",
        "../playground.py",
        str(pictures[0][0]),
        str(results),
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
    ):
        for prefix in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
            status, content = server.get(prefix + quote(path, safe="/%:"))
            assert status >= 400 or b"<html" in content, path
            assert b"root:" not in content and b"DSD turns" not in content and b"argparse" not in content


def test_a_file_of_the_server_is_not_taken_for_an_upload(server):
    image = {"path": str(GOLDEN / "images" / "0.png"), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [[image], "a", "shapes-sd", "none", "auto", 1, 0]}).encode()
    request = urllib.request.Request(f"{server.url}/gradio_api/call/score", body, {"Content-Type": "application/json"})
    event = json.loads(urllib.request.urlopen(request, timeout=20).read())["event_id"]
    _, answer = server.get(f"gradio_api/call/score/{event}")
    assert b"event: error" in answer and b"scores" not in answer


# ---- stopping, ending, starting


def test_stop_ends_the_computation_and_only_of_who_asks(server, client, pictures):
    files, sentences = pictures
    job = client.submit(
        images=[handle_file(str(files[0]))], texts=LONG, sampling_steps=200, score="hybrid", api_name="/score"
    )
    wait_for_progress(job)
    server.client().predict(api_name="/stop")  # somebody else's
    time.sleep(0.5)
    assert not job.done()
    start = time.monotonic()
    client.predict(api_name="/stop")
    with pytest.raises(AppError, match="was stopped"):
        job.result(timeout=30)
    answer = send(client, files, sentences[0], sampling_steps=1)
    assert len(answer["scores"]) == 2
    assert time.monotonic() - start < 10  # the whole would take about a minute


def wait_for_progress(job) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        progress = job.status().progress_data
        if progress and progress[0].progress:
            return
        time.sleep(0.05)
    raise AssertionError("the computation does not begin")


def test_open_to_others_it_keeps_to_its_model_and_ctrl_c_ends_it_quietly(pictures):
    with running("--server_name", "0.0.0.0", "--model", SHAPES_SD) as server:
        client = server.client()
        assert str(ROOT) not in json.dumps(client.config)  # visitors see names, not paths
        for settings in ({"model": str(GOLDEN / "tiny-sd")}, {"checkpoint": str(GOLDEN / "lora-legacy")}):
            with pytest.raises(AppError, match="open to others"):
                send(client, pictures[0][:1], "a", **settings)
        assert send(client, pictures[0][:1], "a", sampling_steps=1)["scores"]
        job = client.submit(
            images=[handle_file(str(pictures[0][0]))], texts=LONG, sampling_steps=200, api_name="/score"
        )
        wait_for_progress(job)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 130
        assert not list(server.temporary.glob("dsd-playground-*"))  # the uploads are gone
    assert "interrupted" in server.output[-1] and not any("Traceback" in line for line in server.output)


def test_a_bad_flag_ends_in_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = {
            "no model folder": launch("--model", "/nowhere", port=free_port(), temporary=tmp_path),
            "cannot be served on 127.0.0.1": launch("--results_dir", "/nowhere", port=port, temporary=tmp_path),
        }
        for sentence, process in started.items():
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 1
            assert re.fullmatch(rf"playground\.py: .*{sentence}.*\n", output)


# ---- parts


@pytest.mark.parametrize(
    ("scores", "label", "expected"),
    [
        ([[3.0], [1.0]], 0, 2.0),
        ([[3.0], [1.0]], 1, -2.0),
        ([[1.0, 5.0, 4.5]], 1, 0.5),
        ([[1.0, 0.5], [0.75, 2.0]], None, 0.25),  # both captions; image 0 and 1; the least of four
        ([[1.0, 3.0], [0.75, 2.0]], None, -2.0),
    ],
)
def test_margin(scores, label, expected):
    assert margin(scores, label) == expected


def test_matrix_marks_the_best_of_rows_and_columns_and_escapes():
    table = matrix_table([[1.0, 2.0], [3.0, 0.5]], ["<i>.png", "b.png"], ["<script>", "y"])
    assert "<script>" not in table and "<i>" not in table
    assert re.findall(r">([▶▲]+ )?([+-][\d.]+)<", table) == [
        ("", "+1.000"), ("▶▲ ", "+2.000"), ("▶▲ ", "+3.000"), ("", "+0.500"),
    ]  # fmt: skip
    assert "▶" not in matrix_table([[1.0], [2.0]], ["a", "b"], ["x"])  # one sentence: none to choose from
    matrix_table([[1.0]], ["a"], ["x"])  # nothing to scale the colours by


def test_cards_of_wrong_items_escape():
    record = {"id": "<x>", "texts": ["<script>", "b"], "images": ["<p>"], "label": 0, "scores": [[0.0, 1.0]]}
    card = wrong_item(record)
    assert "<script>" not in card and "<p>" not in card and "<x>" not in card and card.count("<li") == 2
