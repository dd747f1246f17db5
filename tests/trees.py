"""Small folder trees in the layouts of the benchmarks: real ids where the real files are at hand."""

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import custom_datasets

REPOSITORY = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("DSD_REFERENCE_DATA", REPOSITORY.parent / "shared" / "reference-data"))
RELEASED = ("compositional_visual_genome.csv", "vqa_text_test.csv", "test.txt")
HAVE_REFERENCE = all((REFERENCE / name).is_file() for name in RELEASED)
WITH_FILES = [
    (name, mode)
    for mode in ("eval", "train")  # evaluation first
    for name, benchmark in custom_datasets.BENCHMARKS.items()
    if mode in benchmark.modes and not name.startswith("Shapes")
]


def build_tree(root: Path, items: int = 6, reference: bool = HAVE_REFERENCE, seed: int = 0) -> tuple[Path, Path]:
    """Writes the annotation files and the pictures of the first `items` items of every benchmark and mode.

    The annotation files are the released ones if `reference`, made-up ones of the same form if not. `seed` is
    the one that the random wrong candidates will be drawn with.

    Returns:
        What `--data_root` must be, and the folder of the annotation files.
    """
    data_dir = root / "DSD" / "data"
    data_dir.mkdir(parents=True)
    if reference:
        for name in RELEASED:
            shutil.copy(REFERENCE / name, data_dir / name)
    else:
        comvg_rows(20).to_csv(data_dir / "compositional_visual_genome.csv", index_label="id")
        vqa_rows(40).to_csv(data_dir / "vqa_text_test.csv", index=False)
        (data_dir / "test.txt").write_text("\n".join(binary_lines(40)) + "\n")
    # Training takes 5 % of a file, so these are 20 times as long as what is used of them.
    comvg_rows(20 * items).to_csv(data_dir / "comvg_train.csv", index_label="id")
    vqa_rows(20 * items).to_csv(data_dir / "vqa_text_train.csv", index=False)

    refcocog = root / "refcocog"
    refcocog.mkdir()
    refs, instances = refcocog_annotations(20 * items)
    (refcocog / "refs(google).p").write_bytes(pickle.dumps(refs, protocol=2))
    (refcocog / "instances.json").write_text(json.dumps(instances))

    winoground = root / "winoground"
    winoground.mkdir()
    lines = [json.dumps(example) for example in winoground_examples(items)]
    (winoground / "examples.jsonl").write_text("\n".join(lines) + "\n")

    for name, mode in WITH_FILES:
        dataset = custom_datasets.get_dataset(name, root, mode=mode, seed=seed, data_dir=data_dir)
        for index in range(min(items, len(dataset))):
            for path in dataset.item(index).images:
                draw_picture(path)
    return root, data_dir


def draw_picture(path: Path) -> None:
    """A blotchy picture that depends on the file's name alone, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 48), Image.Resampling.BICUBIC).save(path)


def comvg_rows(each: int) -> pd.DataFrame:
    rows = []
    for kind in ("subject", "object", "verb"):
        for _ in range(each):
            image_id = 180 + 2 * len(rows)
            sentence = f"dog {image_id} is lying on a mat"
            triplets = ["dog,lie,mat", "('cat', 'sit', 'bed')"]
            rows.append([sentence, *triplets, image_id, image_id + 1, kind])
    columns = ["sentence", "pos_triplet", "neg_triplet", "pos_image_id", "neg_image_id", "neg_value"]
    return pd.DataFrame(rows, columns=columns, index=range(1, len(rows) + 1))


def vqa_rows(count: int) -> pd.DataFrame:
    rows = [
        {"sentence": f"How many of {i}? none", "pos_image_id": 1000 + i}
        | {f"neg_sentence_{k}": f"How many of {i}? {k}" for k in range(1, 10)}
        for i in range(count)
    ]
    return pd.DataFrame(rows)


def binary_lines(count: int) -> list[str]:
    """Every fourth line asks about something else; the rest share their sentences, as in the real file."""
    lines = []
    for i in range(count):
        number = i % 12
        asked = f"others: what is {i}? {i}" if i % 4 == 3 else f"yes or no: is it {number}? it is {number}."
        lines.append(f"COCO_val2014_{500 + i:012}.jpg*The question is asking about {asked}")
    return lines


def refcocog_annotations(count: int) -> tuple[list[dict], dict]:
    """Two things in each image, two sentences on each; an image's things can be in different splits."""
    refs = []
    for i in range(count):
        image_id = 9 + i // 2
        # "the left one" is said of many images, as in the real annotations.
        texts = [f"thing {i} on the table", "the left one" if i % 5 == 0 else f"the {i}th thing"]
        refs.append(
            {
                "ref_id": i,
                "ann_id": 70000 + i,
                "image_id": image_id,
                "category_id": 1 + i % 80,
                "file_name": f"COCO_train2014_{image_id:012}_{70000 + i}.jpg",
                "split": "val" if i % 3 == 0 else "train",
                "sent_ids": [2 * i, 2 * i + 1],
                "sentences": [
                    {"sent_id": 2 * i + k, "sent": text, "raw": text, "tokens": text.split()}
                    for k, text in enumerate(texts)
                ],
            }
        )
    images = [
        {"id": image_id, "file_name": f"COCO_train2014_{image_id:012}.jpg", "width": 60, "height": 48}
        for image_id in sorted({ref["image_id"] for ref in refs})
    ]
    annotations = [
        {"id": r["ann_id"], "image_id": r["image_id"], "category_id": r["category_id"], "bbox": [0, 0, 9, 9]}
        for r in refs
    ]
    return refs, {"images": images, "annotations": annotations, "categories": []}


def winoground_examples(count: int) -> list[dict]:
    return [
        {
            "id": i,
            "image_0": f"ex_{i}_img_0",
            "image_1": f"ex_{i}_img_1",
            "tag": "Noun",
            "caption_0": f"{i} dogs and a cat",
            "caption_1": f"a cat and {i} dogs",
        }
        for i in range(count)
    ]
