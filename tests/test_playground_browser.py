"""The playground in headless Chromium, as a visitor uses it.

With the environment variable DSD_SCREENSHOTS naming a folder, a screenshot of each tab goes there; the tab Benchmark
then shows the newest of the real results in results/, or the one that DSD_SCREENSHOTS_RESULTS names.
"""

import csv
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_playground import LONG, Server, draw_pictures, running, running_with_results

pytestmark = pytest.mark.xdist_group("playground")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60_000  # milliseconds: other tests may be using the processor


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with running_with_results(tmp_path_factory.mktemp("pages")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """The page as it is at first; every test checks that it asks nothing of other servers."""
    page, asked = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.get_by_role("button", name="Score", exact=True).wait_for()
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def upload(page: Page, *files: Path) -> None:
    """Gives files to the open tab, and waits until they are shown."""
    inputs = page.locator("input[type=file]:not([webkitdirectory])")
    tab = page.get_by_role("tab", selected=True).inner_text()
    inputs.nth(["Match", "Explain"].index(tab)).set_input_files([str(file) for file in files])


def expect_previews(page: Page, number: int) -> None:
    expect(page.get_by_role("tabpanel").locator(".grid-container img:visible")).to_have_count(number, timeout=PATIENCE)


def screenshot(page: Page, name: str, height: int | None = None) -> None:
    if folder := os.environ.get("DSD_SCREENSHOTS"):
        page.wait_for_timeout(1000)  # pictures and transitions
        Path(folder).mkdir(parents=True, exist_ok=True)
        clip = {"x": 0, "y": 0, "width": 1280, "height": height} if height else None
        page.screenshot(path=Path(folder) / f"playground-{name}.png", full_page=True, clip=clip)


def test_a_visitor_scores_pictures_and_downloads_the_matrix(page, tmp_path):
    files, sentences = draw_pictures(tmp_path)
    upload(page, *files)
    expect_previews(page, 2)
    page.get_by_label("Sentences").fill("\n".join(sentences))
    page.get_by_role("button", name="Score", exact=True).click()
    table = page.locator("#matrix table")
    expect(table.locator("tbody tr")).to_have_count(2, timeout=PATIENCE)
    assert table.locator("thead th").all_inner_texts()[1:] == sentences
    assert [head.strip() for head in table.locator("tbody th").all_inner_texts()] == ["one.png", "two.png"]
    cells = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert cells[0][0].startswith("▶▲ +") and cells[1][1].startswith("▶▲ +")  # each picture has its sentence
    assert not re.search("[▶▲]", cells[0][1] + cells[1][0])
    assert "10 timesteps" in page.locator("#matrix").inner_text() and "seconds" in page.locator("#matrix").inner_text()
    page.get_by_role("button", name="The two terms").click()
    expect(page.locator("#terms table")).to_have_count(2)

    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    rows = list(csv.reader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
    assert download.value.suggested_filename == "dsd-scores.csv"
    assert rows[0] == ["image", "text", "score", "attention", "denoising"] and len(rows) == 5
    assert rows[1][:2] == ["one.png", sentences[0]] and f"{float(rows[1][2]):+.3f}" in cells[0][0]


def test_an_example_fills_the_form(page):
    page.get_by_role("button", name="4 pictures × 4 sentences").click()
    expect(page.get_by_label("Sentences")).to_have_value(re.compile(r"^a .+\n.+\n.+\n.+$"), timeout=PATIENCE)
    expect_previews(page, 4)
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#matrix tbody tr")).to_have_count(4, timeout=PATIENCE)
    screenshot(page, "match")


def test_a_broken_file_is_told_in_a_sentence(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    upload(page, broken)
    expect(page.get_by_text("broken.png cannot be read as a picture").first).to_be_visible(timeout=PATIENCE)
    assert "/tmp" not in page.get_by_text("broken.png cannot be read as a picture").first.inner_text()


def test_a_name_or_sentence_with_html_is_shown_as_it_is(page, tmp_path):
    files, _ = draw_pictures(tmp_path)
    upload(page, files[0])
    page.get_by_label("Sentences").fill("<img src=x onerror=document.title='broken-in'>")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#matrix thead th").nth(1)).to_contain_text("<img src=x", timeout=PATIENCE)
    page.get_by_label("Sentences").fill("a\n" * 33)
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_text("These are 33 sentences").first).to_be_visible(timeout=PATIENCE)
    assert page.title() == "DSD playground"


def test_stop_stops(page, tmp_path):
    files, sentences = draw_pictures(tmp_path)
    upload(page, files[0])
    expect_previews(page, 1)
    page.get_by_label("Sentences").fill(LONG)
    slider = page.get_by_label("number input for Timesteps")
    slider.fill("200")
    slider.press("Enter")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_text(re.compile("computing")).first).to_be_visible(timeout=PATIENCE)  # the progress bar
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    expect(page.get_by_text(re.compile("computing"))).to_have_count(0, timeout=PATIENCE)
    slider.fill("1")
    slider.press("Enter")
    page.get_by_label("Sentences").fill(sentences[0])
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#matrix thead th").nth(1)).to_have_text(sentences[0], timeout=15_000)


def test_a_visitor_sees_word_maps(page, tmp_path):
    open_tab(page, "Explain")
    files, sentences = draw_pictures(tmp_path)
    upload(page, files[0])
    page.get_by_label("Sentence", exact=True).fill(sentences[0])
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(page.locator("#maps .grid-container img")).to_have_count(len(sentences[0].split()), timeout=PATIENCE)
    page.wait_for_function("[...document.querySelectorAll('#maps img')].every(image => image.naturalWidth >= 128)")
    assert re.fullmatch(r"a \d+%", page.locator("#maps .caption-label").first.inner_text())
    screenshot(page, "explain")


def test_a_visitor_reads_a_benchmark(page):
    open_tab(page, "Benchmark")
    page.locator("#folder input").click()
    expect(page.get_by_role("option")).to_have_count(3)
    page.get_by_role("option", name="run/Shapes_sub").click()
    expect(page.locator("#figures table")).to_contain_text("accuracy", timeout=PATIENCE)
    expect(page.locator("#wrong .dsd-item")).to_have_count(5)
    page.wait_for_function("[...document.querySelectorAll('#wrong img')].every(image => image.naturalWidth > 0)")
    expect(page.locator("img[src^='data:image/png']").first).to_be_visible()
    if "DSD_SCREENSHOTS" in os.environ:  # the scores above are made up
        with running() as server:
            page.goto(server.url)
            open_tab(page, "Benchmark")
            page.locator("#folder input").click()
            page.get_by_role("option", name=os.environ.get("DSD_SCREENSHOTS_RESULTS")).first.click()
            page.locator("#wrong .dsd-item").first.wait_for()
            screenshot(page, "benchmark", height=1300)
