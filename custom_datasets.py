"""The benchmarks: what is matched with what, and in which files it stands.

To add one, write a class like those below (`__init__` fills `self.rows`, `item` turns a row into an `Item`)
and name it in the table `BENCHMARKS` at the end. `dsd_infer.py` and `dsd_train.py` then know it. Annotation
files are read from `data/` (its README says which they are), pictures from the folders next to the checkout.
"""

import difflib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from torch.utils.data import Dataset

from diffusers_dsd.errors import DSDError, ItemError
from diffusers_dsd.images import open_image
from diffusers_dsd.safe_pickle import load_plain_pickle
from diffusers_dsd.shapes import shapes_item

DATA_DIR = Path(__file__).parent / "data"
FEW_SHOT = 0.05  # training uses the first 5 % of a training file, as in the paper
NEGATIVES = 9  # where the wrong candidates are drawn at random
SHAPES_LENGTH = {"eval": 1200, "train": 900}  # an endless list is cut here

DSD_DATA = "https://github.com/eric-ai-lab/DSD"
COMVG_DATA = "https://github.com/eric-ai-lab/ComVG"
VISUAL_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
COCO = "https://cocodataset.org/#download (2014 images)"
REFCOCOG = "https://github.com/lichengunc/refer (RefCOCOg, google split)"
VQA_V2 = "https://visualqa.org/download.html (COCO 2014 images)"
WINOGROUND = "https://huggingface.co/datasets/facebook/winoground"


@dataclass
class Item:
    """One question: every image is scored against every text, and the right pair should win.

    Attributes:
        id: unique in its benchmark and mode.
        texts: one or more sentences.
        images: paths, or PIL images for what is drawn; or whatever `transform` returns, if there is one.
        image_ids: names of the images, parallel to `images`.
        label: index of the right image (if there is 1 text) or of the right text (if there is 1 image); None
            where text i belongs to image i.
        tags: groups that figures are also given for, for example {"change": "opposite"}.
    """

    id: str
    texts: list[str]
    images: list[Any]
    image_ids: list[str]
    label: int | None = 0
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What `get_dataset` was asked for."""

    name: str
    metrics: str
    root: Path
    data_dir: Path
    mode: str
    seed: int
    resize: int
    transform: Callable[[Image.Image], Any] | None


class MatchingDataset(Dataset):
    """A sequence of `Item`s.

    Attributes:
        name: of the benchmark.
        metrics: "accuracy", "recall" or "winoground".
        rows: one of each item.
        files: the annotation files they were read from; an evaluation whose files have changed is not gone on with.
    """

    images_from = ""  # where the user gets the pictures

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name
        self.metrics = settings.metrics
        self.rows: Sequence[Any] = []
        self.files: list[Path] = []

    def annotations(self, path: Path, source: str) -> "Annotations":
        """An annotation file of this benchmark, to be read, and where the user gets it."""
        self.files.append(path)
        return Annotations(self.name, path, source)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        """The item, its pictures present and transformed.

        Raises:
            ItemError: a picture is missing or, with a `transform`, unreadable.
        """
        item = self.item(range(len(self))[index])
        for image, image_id in zip(item.images, item.image_ids, strict=True):
            if isinstance(image, Path) and not os.path.isfile(image):  # is_file() raises where a name is too long
                raise ItemError(
                    f"Item {item.id} of {self.name} needs picture {image_id}, but there is no {image}: "
                    f"download it from {self.images_from}, or say with --data_root where its folders are.",
                    item.id,
                )
        if self.settings.transform:
            item.images = [self._transformed(image) for image in item.images]
        return item

    def item(self, index: int) -> Item:
        """The item as it stands in the files: pictures are paths that may not exist."""
        raise NotImplementedError

    def few_shot(self, rows: Sequence[Any]) -> Sequence[Any]:
        """All rows for evaluation, the first 5 % for training."""
        return rows[: max(1, int(FEW_SHOT * len(rows)))] if self.settings.mode == "train" else rows

    def random_others(self, item_id: str, pool: Sequence[str], banned: set[str]) -> list[str]:
        """Different members of `pool`, none in `banned`; they depend on (seed, item) alone."""
        rng = random.Random(f"{self.settings.seed} {item_id}")  # seeding by a string is the same everywhere
        chosen: dict[str, None] = {}
        for _ in range(1000):
            one = rng.choice(pool)
            if one not in banned:
                chosen[one] = None
            if len(chosen) == NEGATIVES:
                return list(chosen)
        raise ItemError(
            f"Item {item_id} of {self.name} needs {NEGATIVES} wrong candidates, but the annotation file has "
            "too few: download the whole file.",
            item_id,
        )

    def _transformed(self, image: Image.Image | Path) -> Any:
        image = open_image(image) if isinstance(image, Path) else image
        size = (self.settings.resize, self.settings.resize)
        return self.settings.transform(image.resize(size, Image.Resampling.BICUBIC))


class Annotations:
    """One annotation file of a benchmark; every way of reading it complains in one sentence.

    Args:
        benchmark: its name.
        path: the file.
        source: where the user gets it.

    Raises:
        DSDError: the file is missing.
    """

    def __init__(self, benchmark: str, path: Path, source: str) -> None:
        self.benchmark, self.path, self.source = benchmark, path, source
        if not path.is_file():
            raise self.error("it is not there")

    def error(self, problem: str) -> DSDError:
        return DSDError(f"{self.benchmark} needs {self.path}, but {problem}: download it from {self.source}.")

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, with their numbers from 1."""
        try:
            lines = self.path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"it is not readable as UTF-8 text ({error})") from None
        if not any(line.strip() for line in lines):
            raise self.error("it is empty")
        return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())

    def table(self, texts: list[str], ids: list[str], kinds: dict[str, str] | None = None) -> pd.DataFrame:
        """The named columns of a CSV file as strings, indexed by row number from 1.

        Args:
            texts: columns that must hold some text.
            ids: columns that must hold whole numbers; "180.0", which pandas likes to write, becomes "180".
            kinds: further columns, and what their values must match.
        """
        columns = dict.fromkeys(texts, "(?s:.+)") | dict.fromkeys(ids, r"[0-9]{1,18}(\.0+)?") | (kinds or {})
        try:
            table = pd.read_csv(self.path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # pandas' own errors and UnicodeDecodeError are ValueErrors
            reason = str(error).strip().splitlines()[-1]
            raise self.error(f"it is not readable as a UTF-8 CSV file ({reason})") from None
        for column in columns:
            if column not in table:
                raise self.error(f"it has no column {column}")
        if table.empty:
            raise self.error("it has no rows")
        table = table[list(columns)].fillna("").apply(lambda column: column.str.strip())
        table.index = pd.RangeIndex(1, len(table) + 1)
        for column, pattern in columns.items():
            for row, value in table.loc[~table[column].str.fullmatch(pattern), column].items():
                raise self.error(f"its row {row} has {value[:80]!r} as {column}")  # the first such row
        for column in ids:
            table[column] = table[column].str.split(".").str[0]
        return table


class ComVG(MatchingDataset):
    """1 sentence, 2 photographs of Visual Genome; the wrong one has another subject, object or verb."""

    images_from = VISUAL_GENOME

    def __init__(self, settings: Settings, changed: str = "") -> None:
        super().__init__(settings)
        if settings.mode == "train":
            file = self.annotations(settings.data_dir / "comvg_train.csv", DSD_DATA)
            self.folder = settings.root / "Visual_Genome" / "VG_100K"
        else:
            file = self.annotations(settings.data_dir / "compositional_visual_genome.csv", COMVG_DATA)
            self.folder = settings.root / "Visual_Genome" / "vg_concept"
        # Training on all of them does not need to know which word was changed.
        needs_kind = changed or settings.mode == "eval"
        kinds = {"neg_value": "subject|object|verb"} if needs_kind else {}
        table = file.table(["sentence"], ["pos_image_id", "neg_image_id"], kinds)
        if changed:
            table = table[table["neg_value"] == changed]
            if table.empty:
                raise file.error(f"it has no row with {changed} as neg_value")
        self.rows = self.few_shot(list(table.itertuples()))

    def item(self, index: int) -> Item:
        row = self.rows[index]
        ids = [row.pos_image_id, row.neg_image_id]
        tags = {"kind": row.neg_value} if hasattr(row, "neg_value") else {}
        return Item(str(row.Index), [row.sentence], [self.folder / f"{i}.jpg" for i in ids], ids, tags=tags)


class Refcocog(MatchingDataset):
    """1 photograph, a sentence on one thing in it and 9 sentences on things in other photographs."""

    images_from = COCO

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        file = self.annotations(settings.root / "refcocog" / "refs(google).p", REFCOCOG)
        splits = ("train",) if settings.mode == "train" else ("val", "test")
        # One image can have things in several splits, so what describes it is collected from all of them.
        self.of_image: dict[int, set[str]] = {}
        rows = []
        try:
            refs = load_plain_pickle(file.path)
        except DSDError as error:
            raise DSDError(f"{self.name}: {str(error).removesuffix('.')} ({REFCOCOG}).") from None
        try:
            for ref in refs:
                image_id = int(ref["image_id"])
                if not 0 <= image_id < 10**18:
                    raise ValueError("an image_id that is out of range")
                for sentence in ref["sentences"]:
                    text = sentence["sent"].strip()
                    self.of_image.setdefault(image_id, set()).add(text)
                    if ref["split"] in splits:
                        rows.append((str(sentence["sent_id"]), image_id, text))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise file.error(f"it does not hold a list of references ({error!r})") from None
        if not rows:
            raise file.error(f"it has nothing in its split {splits[0]}")
        self.pool = [text for _, _, text in rows]
        self.rows = self.few_shot(rows)

    def item(self, index: int) -> Item:
        sentence_id, image_id, text = self.rows[index]
        wrong = self.random_others(sentence_id, self.pool, banned=self.of_image[image_id])
        folder = self.settings.root / "refcocog" / "images" / "train2014"
        image = folder / f"COCO_train2014_{image_id:012}.jpg"
        return Item(sentence_id, [text, *wrong], [image], [str(image_id)])


class VqaText(MatchingDataset):
    """1 photograph, a question with its answer and the same question with 9 wrong answers."""

    images_from = VQA_V2
    wrong = tuple(f"neg_sentence_{i}" for i in range(1, 10))

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        train = settings.mode == "train"
        self.part = "train2014" if train else "val2014"
        path = settings.data_dir / ("vqa_text_train.csv" if train else "vqa_text_test.csv")
        table = self.annotations(path, DSD_DATA).table(["sentence", *self.wrong], ["pos_image_id"])
        self.rows = self.few_shot(list(table.itertuples()))

    def item(self, index: int) -> Item:
        row = self.rows[index]
        # Row 683 of the released file has its right sentence among the wrong ones too.
        wrong = [text for column in self.wrong if (text := getattr(row, column)) != row.sentence]
        file = f"COCO_{self.part}_{int(row.pos_image_id):012}.jpg"
        image = self.settings.root / "vqav2" / self.part / file
        return Item(str(row.Index), [row.sentence, *wrong], [image], [row.pos_image_id])


class VqaBinary(MatchingDataset):
    """1 yes/no question with its answer, its photograph and 9 photographs of other sentences."""

    images_from = VQA_V2
    line = re.compile(r"(COCO_(?:train|val)2014_\d{12}\.jpg)\*The question is asking about ([^:]+): (.+)")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        file = self.annotations(settings.data_dir / "test.txt", DSD_DATA)
        rows = []
        self.images_of: dict[str, set[str]] = {}  # "is it raining? it is raining." is said of seven images
        for number, text in file.lines():
            match = self.line.fullmatch(text)
            if not match:
                raise file.error(f"its line {number} is not 'file.jpg*The question is asking about …: text'")
            if match[2] == "yes or no":
                rows.append((str(number), match[1], match[3]))
                self.images_of.setdefault(self.plain(match[3]), set()).add(match[1])
        if not rows:
            raise file.error("it has no yes-or-no sentence")
        self.rows = rows
        self.pool = list(dict.fromkeys(image for _, image, _ in rows))

    @staticmethod
    def plain(text: str) -> str:
        return text.lower().rstrip(". ")

    def item(self, index: int) -> Item:
        line_number, right, text = self.rows[index]
        names = [right, *self.random_others(line_number, self.pool, banned=self.images_of[self.plain(text)])]
        # The name says the folder: COCO_val2014_….jpg is in val2014.
        images = [self.settings.root / "vqav2" / name.split("_")[1] / name for name in names]
        return Item(line_number, [text], images, [str(int(image.stem.split("_")[2])) for image in images])


class Winoground(MatchingDataset):
    """2 photographs and 2 captions of the same words in another order: caption i belongs to image i."""

    images_from = WINOGROUND
    keys = ("id", "image_0", "image_1", "caption_0", "caption_1")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        file = self.annotations(settings.root / "winoground" / "examples.jsonl", WINOGROUND)
        rows = []
        for number, text in file.lines():
            try:
                rows.append(self.example(text))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise file.error(f"its line {number} is not an example ({error!r})") from None
        self.rows = rows

    def example(self, line: str) -> list[str]:
        """The values of `keys` in a line of JSON; raises ValueError, KeyError, TypeError or RecursionError."""
        example = json.loads(line)
        values = [example[key] for key in self.keys]
        if not isinstance(values[0], (int, str)) or not all(isinstance(value, str) for value in values[1:]):
            raise ValueError("a name or caption is no text")
        if any(not image_id or Path(image_id).name != image_id for image_id in values[1:3]):
            raise ValueError("an image is no file name")
        return [str(value) for value in values]

    def item(self, index: int) -> Item:
        example_id, *image_ids, caption_0, caption_1 = self.rows[index]
        folder = self.settings.root / "winoground" / "images"
        images = [folder / f"{image_id.removesuffix('.png')}.png" for image_id in image_ids]
        return Item(example_id, [caption_0, caption_1], images, image_ids, label=None)


class Shapes(MatchingDataset):
    """Drawn scenes of two things and how they stand to each other; no files."""

    def __init__(self, settings: Settings, kinds: Sequence[str], look: str) -> None:
        super().__init__(settings)
        self.kinds, self.look = kinds, look
        self.rows = range(SHAPES_LENGTH[settings.mode])

    def item(self, index: int) -> Item:
        number, turn = divmod(index, len(self.kinds))
        split = "train" if self.settings.mode == "train" else "test"
        size = max(16, min(self.settings.resize, 512))
        drawn = shapes_item(self.kinds[turn], number, self.settings.seed, split, self.look, size)
        image_ids = [f"{drawn.id}-{i}" for i in range(len(drawn.images))]
        if split == "train" and self.metrics == "winoground":
            # The wrong picture has a sentence too, so one item asks both ways: which picture, and which sentence.
            return Item(
                drawn.id, [scene.sentence for scene in drawn.scenes], list(drawn.images), image_ids, None, drawn.tags
            )
        return Item(drawn.id, drawn.texts, list(drawn.images), image_ids, drawn.label, drawn.tags)


@dataclass(frozen=True)
class Benchmark:
    """A line of the table below.

    Attributes:
        description: for `--help`.
        metrics: "accuracy" (of 2 candidates), "recall" (recall@1 and @5 of 10) or "winoground".
        load: makes the dataset from its `Settings`.
        modes: "eval" and "train", or one of them.
        train_metrics: the same for the training items, where they ask something else.
    """

    description: str
    metrics: str
    load: Callable[[Settings], MatchingDataset]
    modes: tuple[str, ...] = ("eval", "train")
    train_metrics: str | None = None


IMAGE_KINDS = ("sub", "obj", "verb")

BENCHMARKS = {
    "ComVG_sub": Benchmark("ComVG, another subject", "accuracy", partial(ComVG, changed="subject")),
    "ComVG_obj": Benchmark("ComVG, another object", "accuracy", partial(ComVG, changed="object")),
    "ComVG_verb": Benchmark("ComVG, another verb", "accuracy", partial(ComVG, changed="verb")),
    "ComVG": Benchmark("1 sentence, 2 photographs of Visual Genome", "accuracy", ComVG),
    "Refcocog": Benchmark("1 photograph of COCO, 10 sentences", "recall", Refcocog),
    "vqa_other": Benchmark("1 photograph of COCO, a question with 10 answers", "recall", VqaText, ("eval",)),
    "vqa_binary": Benchmark("1 answered yes/no question, 10 photographs", "recall", VqaBinary, ("eval",)),
    "vqa": Benchmark("the training set for vqa_other and vqa_binary", "recall", VqaText, ("train",)),
    "winoground": Benchmark("2 photographs, 2 captions", "winoground", Winoground, ("eval",)),
}
for _name, _look, _words in (("Shapes", "plain", ""), ("ShapesShift", "shift", " in an unseen look")):
    for _kind, _what in (("sub", "first thing"), ("obj", "second thing"), ("verb", "relation")):
        BENCHMARKS[f"{_name}_{_kind}"] = Benchmark(
            f"1 sentence, 2 drawings{_words}, another {_what}",
            "accuracy",
            partial(Shapes, kinds=(_kind,), look=_look),
            train_metrics="winoground",
        )
    BENCHMARKS[_name] = Benchmark(
        f"{_name}_sub, _obj and _verb in turn",
        "accuracy",
        partial(Shapes, kinds=IMAGE_KINDS, look=_look),
        train_metrics="winoground",
    )
    BENCHMARKS[f"{_name}_text"] = Benchmark(
        f"1 drawing{_words}, 10 sentences", "recall", partial(Shapes, kinds=("text",), look=_look)
    )


def get_dataset(
    dataset_name: str,
    root_dir: str | os.PathLike[str],
    transform: Callable[[Image.Image], Any] | None = None,
    resize: int = 512,
    mode: str = "eval",
    seed: int = 0,
    *,
    data_dir: str | os.PathLike[str] = DATA_DIR,
) -> MatchingDataset:
    """A benchmark by its name: a sequence of `Item`s.

    Args:
        dataset_name: a key of `BENCHMARKS`, in upper or lower case.
        root_dir: the folder that holds refcocog/, vqav2/, Visual_Genome/, winoground/.
        transform: what to do with every picture, after it was opened and resized to `resize` × `resize`.
            Without one an item holds the paths, so that `DSDPipeline` can open each file once.
        resize: width and height for `transform`, and for what is drawn (at least 16, at most 512).
        mode: "eval", or "train" for the training set.
        seed: 0 or more: draws the random wrong candidates, and the questions of Shapes.
        data_dir: the folder with the annotation files.

    Raises:
        DSDError: an unknown name or mode, or a missing or damaged annotation file.
    """
    names = {name.lower(): name for name in BENCHMARKS}
    name = names.get(dataset_name.lower(), "")
    if not name:
        near = [names[match] for match in difflib.get_close_matches(dataset_name.lower(), names)]
        hint = f"did you mean {' or '.join(near)}? All are" if near else "choose one of"
        raise DSDError(f"There is no benchmark {dataset_name!r}: {hint} {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    if mode not in ("eval", "train"):
        raise DSDError(f"There is no mode {mode!r} of a benchmark: choose 'eval' or 'train'.")
    if mode not in benchmark.modes:
        use, other_use = ("training", "evaluation") if mode == "train" else ("evaluation", "training")
        choices = ", ".join(other for other, spec in BENCHMARKS.items() if mode in spec.modes)
        raise DSDError(f"{name} is for {other_use} only: for {use} choose one of {choices}.")
    settings = Settings(
        name,
        (mode == "train" and benchmark.train_metrics) or benchmark.metrics,
        Path(root_dir),
        Path(data_dir),
        mode,
        seed,
        resize,
        transform,
    )
    return benchmark.load(settings)
