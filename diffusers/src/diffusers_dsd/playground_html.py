"""What the playground shows, as HTML and Matplotlib figures. Everything that users wrote is escaped here."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from diffusers_dsd.images import to_image
from diffusers_dsd.metrics import Figure as Mean

# Gradio's own variables follow its light and dark theme; cells bring their own two colours.
CSS = """
.dsd { overflow-x: auto; }
.dsd table { border-collapse: collapse; }
.dsd th, .dsd td { padding: 6px 10px; border: 1px solid var(--border-color-primary); font-weight: normal; }
.dsd th { text-align: left; min-width: 6em; max-width: 16em; overflow-wrap: anywhere; vertical-align: bottom; }
.dsd tbody th { vertical-align: middle; }
.dsd th img, .dsd-item img { display: inline-block; width: 64px; height: 64px; object-fit: contain; margin: 0 8px 0 0;
  vertical-align: middle; }
.dsd td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.dsd td.best { font-weight: bold; }
.dsd-note { opacity: 0.75; margin: 6px 0; }
.dsd-items { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
.dsd-item { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px; overflow-wrap: anywhere; }
.dsd-item.dsd-item li { list-style: none; margin: 4px 0; }
.dsd-right { border-left: 4px solid #2a9d4a; padding-left: 6px; }
.dsd-wrong { border-left: 4px solid #d1495b; padding-left: 6px; }
"""
_COLOURS = colormaps["cividis"]  # told apart by people who see no red or no green, too
_THUMBNAIL = 128  # pixels


def note(text: str) -> str:
    """A line in a quieter colour."""
    return f'<p class="dsd-note">{escape(text)}</p>'


def thumbnail(image: Image.Image) -> str:
    """A small copy of a picture as an <img> that needs no file."""
    buffer = io.BytesIO()
    to_image(image, _THUMBNAIL).save(buffer, "JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def matrix_table(
    scores: Sequence[Sequence[float]], images: Sequence[str], texts: Sequence[str], thumbnails: Sequence[str] = ()
) -> str:
    """Scores as a coloured table with a row for each image and a column for each text.

    The best of each row has a ▶ and the best of each column a ▲, where there is more than one to choose from.
    """
    table = np.asarray(scores, dtype=float)  # (images, texts)
    best_of_row = (table == table.max(1, keepdims=True)) & (len(texts) > 1)
    best_of_column = (table == table.max(0, keepdims=True)) & (len(images) > 1)
    shades = (table - table.min()) / (float(np.ptp(table)) or 1)
    lines = ["<tr><th></th>" + "".join(f'<th scope="col">{escape(text)}</th>' for text in texts) + "</tr>"]
    for row, name in enumerate(images):
        cells = []
        for column in range(len(texts)):
            marks = "▶" * bool(best_of_row[row, column]) + "▲" * bool(best_of_column[row, column])
            kind = f' class="best" title="{_meaning(marks)}"' if marks else ""
            cells.append(
                f'<td{kind} style="{_cell_colours(shades[row, column])}">'
                f"{marks}{' ' * bool(marks)}{table[row, column]:+.3f}</td>"
            )
        head = (thumbnails[row] if thumbnails else "") + escape(name)
        lines.append(f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>')
    return f'<div class="dsd"><table><thead>{lines[0]}</thead><tbody>{"".join(lines[1:])}</tbody></table></div>'


def figures_table(figures: dict[str, Mean]) -> str:
    """Figures of an evaluation with their intervals."""
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("figure", "value", "95 % interval", "items"))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{f["value"]:.3f}</td>'
        f"<td>{f['low']:.3f} – {f['high']:.3f}</td><td>{f['n']:,}</td></tr>"
        for name, f in figures.items()
    )
    return f'<div class="dsd"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def margins_figure(margins: Sequence[float]) -> Figure:
    """How many items were right, or wrong, by how much."""
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    axes = figure.subplots()
    low, high = min(*margins, 0.0), max(*margins, 0.0)
    step = (high - low) / 40 or 1.0
    edges = np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step  # 0 is one of them
    right, wrong = [m for m in margins if m > 0], [m for m in margins if m <= 0]
    labels = [f"wrong: {len(wrong):,}", f"right: {len(right):,}"]
    axes.hist([wrong, right], edges, stacked=True, color=["#d1495b", "#2a9d4a"], label=labels)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("margin: score of the right candidate minus that of the best wrong one")
    axes.set_ylabel("items")
    axes.legend()
    return figure


def wrong_item(record: dict[str, Any], pictures: Sequence[Image.Image] = ()) -> str:
    """A card of an item with the score of each candidate; the right one has a green bar.

    Args:
        record: its line of scores.jsonl.
        pictures: its images, or none.
    """
    texts, names, label = record["texts"], record["images"], record["label"]
    shown = [thumbnail(picture) for picture in pictures] or [f"{name} " for name in map(escape, names)]
    if label is None:  # text i belongs to image i
        candidates = [
            (shown[i] + escape(texts[j]), record["scores"][i][j], i == j) for i in (0, 1) for j in range(len(texts))
        ]
        head = ""
    elif len(names) > 1:
        candidates = [(shown[i], record["scores"][i][0], i == label) for i in range(len(names))]
        head = escape(texts[0])
    else:
        candidates = [(escape(text), record["scores"][0][j], j == label) for j, text in enumerate(texts)]
        candidates.sort(key=lambda candidate: -candidate[1])
        head = shown[0]
    lines = "".join(
        f'<li class="{"dsd-right" if right else "dsd-wrong"}">{what} <b>{score:+.3f}</b>{" (right)" * right}</li>'
        for what, score, right in candidates
    )
    return (
        f'<div class="dsd-item"><div>{head}</div><ul>{lines}</ul><p class="dsd-note">{escape(record["id"])}</p></div>'
    )


def _meaning(marks: str) -> str:
    return {
        "▶": "best sentence for this picture",
        "▲": "best picture for this sentence",
        "▶▲": "best sentence for this picture, and best picture for this sentence",
    }[marks]


def _cell_colours(shade: float) -> str:
    red, green, blue, _ = _COLOURS(float(shade), bytes=True)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return f"background: rgb({red}, {green}, {blue}); color: {'black' if light else 'white'}"
