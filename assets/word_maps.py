"""How often word maps point at the right shape, and a page of examples.

    python assets/word_maps.py                                              # untuned and bundled attention prompts
    python assets/word_maps.py --checkpoint output/attention/final-checkpoint-1000

On held-out Shapes scenes the place of each shape is known: a shape's word points right where its map is strongest
inside that shape. Prints a table with 95 % intervals over scenes and writes the page.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffusers_dsd import DSDPipeline  # noqa: E402
from diffusers_dsd.cli import ends_in_a_sentence, non_negative_int, positive_int  # noqa: E402
from diffusers_dsd.metrics import format_table, summarise  # noqa: E402
from diffusers_dsd.models import SHAPES_PROMPTS, load_pipeline  # noqa: E402
from diffusers_dsd.shapes import shapes_item  # noqa: E402
from diffusers_dsd.wordmaps import WordMaps  # noqa: E402

SHOWN = 4  # scenes on the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=SHAPES_PROMPTS, help="attention prompts (default: the bundled ones)")
    add("--limit", type=positive_int, default=500, metavar="N", help="scenes (default: 500)")
    add("--sampling_time_steps", type=int, default=10, metavar="S", help="timesteps, 1 to 1000 (default: 10)")
    add("--seed", type=non_negative_int, default=1, help="of the scenes and the noise (default: 1)")
    add("--output", type=Path, default=ROOT / "assets" / "word-maps.png", help="page of examples to write")
    args = parser.parse_args()
    with ends_in_a_sentence("word_maps.py"):
        pipe = load_pipeline("shapes-sd")
        pipe.set_progress_bar_config(disable=True)
        page = {}
        for name in ("untuned", "tuned"):
            if name == "tuned":
                pipe.load_attention_prompts(args.checkpoint)
            page[name] = measure(pipe, name, args.limit, args.sampling_time_steps, args.seed)
        draw(page, args.output)
        print(args.output)


def measure(pipe: DSDPipeline, name: str, limit: int, steps: int, seed: int) -> list[WordMaps]:
    """Prints where the shapes' words point, and returns the first scenes' maps."""
    outcomes, shown, areas = [], [], []
    for number in tqdm(range(limit), desc=name, unit="scene"):
        item = shapes_item("verb", number, seed)
        scene, drawing = item.scenes[item.label], item.drawings[item.label]
        maps = pipe.explain(item.images[item.label], scene.sentence, sampling_steps=steps, seed=seed, batch_size=16)
        if len(shown) < SHOWN:
            shown.append(maps)
        outcome = {}
        # "a red circle left of a blue square": the shapes' words are the third and the last
        for which, place, own, other in (("first", 2, 0, 1), ("second", -1, 1, 0)):
            x, y = (int(coordinate * drawing.image.width) for coordinate in maps[place].peak)
            outcome[f"{which} shape's word: inside that shape"] = float(drawing.masks[own][y, x])
            outcome[f"{which} shape's word: inside the other shape"] = float(drawing.masks[other][y, x])
            areas.append(drawing.masks[own].mean())
        outcomes.append((outcome, {}))
    print(
        f"\nshapes-sd {name}, {steps} timesteps, seed {seed}; a shape has {sum(areas) / len(areas):.1%} of the picture"
    )
    print(format_table(summarise(outcomes)))
    return shown


def draw(page: dict[str, list[WordMaps]], path: Path) -> None:
    """Scenes from top to bottom, each untuned and tuned; a column for the picture and for every word."""
    columns = 1 + max(len(maps) for maps in page["tuned"])
    rows = [(name, page[name][scene]) for scene in range(len(page["tuned"])) for name in page]
    figure = Figure(figsize=(1.45 * columns, 1.75 * len(rows)), layout="constrained")
    figure.suptitle("Word maps of shapes-sd on held-out scenes: dark is least, bright is most in each map", fontsize=12)
    panels = figure.subplots(len(rows), columns)
    for axes in panels.flat:
        axes.set_axis_off()
    for line, (name, maps) in zip(panels, rows, strict=True):
        line[0].imshow(maps.image)
        line[0].set_title(name, fontsize=9, loc="left")
        for axes, word_map in zip(line[1:], maps, strict=False):
            axes.imshow(word_map.overlay())
            axes.set_title(f"{word_map.word} {word_map.share:.0%}", fontsize=9)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
