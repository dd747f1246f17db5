import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import custom_datasets
from custom_datasets import BENCHMARKS, get_dataset
from diffusers_dsd.errors import DSDError
from diffusers_dsd.images import open_image
from trees import HAVE_REFERENCE, REFERENCE, REPOSITORY, WITH_FILES, build_tree

real = pytest.mark.skipif(not HAVE_REFERENCE, reason=f"the released annotation files are not in {REFERENCE}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Data root and annotation folder, made up. Not to be changed."""
    return build_tree(tmp_path_factory.mktemp("tree"), items=6, reference=False)


@pytest.fixture
def own_tree(tmp_path):
    """The same for tests that break something."""
    return build_tree(tmp_path, items=1, reference=False)


def load(name, tree, **options):
    return get_dataset(name, tree[0], data_dir=tree[1], **options)


def refusal(name, tree, **options):
    """The sentence a user reads when the first item of a benchmark cannot be had."""
    with pytest.raises(DSDError) as error:
        load(name, tree, **options)[0]
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


# The released files


COUNTS = {"ComVG_sub": 1536, "ComVG_obj": 2584, "ComVG_verb": 1280, "ComVG": 5400}
COUNTS |= {"vqa_other": 1000, "vqa_binary": 3381}


@real
@pytest.mark.parametrize("name, count", COUNTS.items())
def test_every_row_of_the_released_files_is_an_item(name, count):
    dataset = get_dataset(name, "..", data_dir=REFERENCE)
    assert len(dataset) == count
    items = [dataset.item(i) for i in range(count)]
    assert len({item.id for item in items}) == count
    assert all(item.label == 0 for item in items)


@real
def test_the_first_comvg_item_is_the_first_row():
    item = get_dataset("ComVG", "root", data_dir=REFERENCE).item(0)
    assert item.texts == ["a man is sitting at a table"]
    assert item.image_ids == ["2358258", "2357994"]
    assert item.images == [Path(f"root/Visual_Genome/vg_concept/{i}.jpg") for i in item.image_ids]
    assert item.tags == {"kind": "subject"}


@real
def test_no_wrong_sentence_of_vqa_is_the_right_one():
    dataset = get_dataset("vqa_other", "root", data_dir=REFERENCE)
    items = [dataset.item(i) for i in range(len(dataset))]
    assert all(item.texts[0] not in item.texts[1:] for item in items)
    assert [item.id for item in items if len(item.texts) != 10] == ["683"]  # where the file repeats it
    assert items[0].images == [Path("root/vqav2/val2014/COCO_val2014_000000108327.jpg")]


@real
def test_negative_images_of_the_released_yes_no_questions():
    dataset = get_dataset("vqa_binary", "root", data_dir=REFERENCE)
    said_of = {}
    for i in range(len(dataset)):
        item = dataset.item(i)
        said_of.setdefault(item.texts[0].lower().rstrip(". "), set()).add(item.image_ids[0])
    for i in range(len(dataset)):
        item = dataset.item(i)
        assert len(set(item.image_ids)) == 10
        assert not set(item.image_ids[1:]) & said_of[item.texts[0].lower().rstrip(". ")]
    assert dataset.item(0).images[0] == Path("root/vqav2/val2014/COCO_val2014_000000119630.jpg")


@real
def test_a_tree_around_the_released_files_opens(tmp_path):
    tree = build_tree(tmp_path, items=1)
    for name, mode in WITH_FILES:
        assert all(open_image(path).mode == "RGB" for path in load(name, tree, mode=mode)[0].images)


# Every benchmark


@pytest.mark.parametrize("name, mode", WITH_FILES)
def test_benchmarks_with_files(tree, name, mode):
    dataset = load(name, tree, mode=mode)
    assert (dataset.name, dataset.metrics) == (name, BENCHMARKS[name].metrics)
    for i in range(6):
        item = dataset[i]
        assert len(item.images) == len(item.image_ids) and all(path.is_file() for path in item.images)
        assert all(item.texts) and len(set(item.texts)) == len(item.texts)
        shape = len(item.images), len(item.texts)
        if name == "winoground":
            assert shape == (2, 2) and item.label is None
        elif dataset.metrics == "accuracy":
            assert shape == (2, 1) and item.label == 0
        else:
            assert shape in ((1, 10), (10, 1)) and item.label == 0


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("Shapes")])
def test_shapes_need_no_files(name, mode):
    dataset = get_dataset(name, "nowhere", resize=32, mode=mode)
    assert len(dataset) == custom_datasets.SHAPES_LENGTH[mode]
    items = [dataset[i] for i in range(12)]
    assert len({item.id for item in items}) == 12
    assert {item.tags["look"] for item in items} == {"shift" if "Shift" in name else "plain"}
    kinds = {item.tags["kind"] for item in items}
    assert kinds == ({"sub", "obj", "verb"} if "_" not in name else {name.split("_")[1]})
    pairs = 10 if name.endswith("text") else {"eval": 2, "train": 4}[mode]
    assert {len(item.images) * len(item.texts) for item in items} == {pairs}
    assert {item.label is None for item in items} == {pairs == 4}
    assert dataset.metrics == {2: "accuracy", 4: "winoground", 10: "recall"}[pairs]
    assert all(image.size == (32, 32) for item in items for image in item.images)
    again = get_dataset(name, "nowhere", resize=64, mode=mode)[3]
    assert again.texts == items[3].texts and again.images[0].size == (64, 64)


def test_a_dataset_is_a_sequence(tree):
    dataset = load("Shapes_sub", tree, resize=16)
    assert dataset[-1].id == dataset[len(dataset) - 1].id
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert sum(1 for _ in load("winoground", tree)) == 6


def test_training_takes_the_first_5_percent(tree):
    assert len(load("ComVG", tree, mode="train")) == 18  # of 360 rows
    assert [item.id for item in load("ComVG_verb", tree, mode="train")] == [str(i) for i in range(241, 247)]
    vqa = load("vqa", tree, mode="train")
    assert len(vqa) == 6 and "train2014" in str(vqa[0].images[0])
    assert "VG_100K" in str(load("ComVG", tree, mode="train")[0].images[0])
    with open(tree[0] / "refcocog" / "refs(google).p", "rb") as file:
        refs = pickle.load(file)
    train = [sentence["sent"] for ref in refs if ref["split"] == "train" for sentence in ref["sentences"]]
    few = load("Refcocog", tree, mode="train")
    assert [item.texts[0] for item in few] == train[: int(0.05 * len(train))]


# Random wrong candidates


def test_wrong_sentences_of_refcocog_say_nothing_about_the_image(tree):
    with open(tree[0] / "refcocog" / "refs(google).p", "rb") as file:
        refs = pickle.load(file)
    sentences = {}
    for ref in refs:
        sentences.setdefault(str(ref["image_id"]), set()).update(s["sent"] for s in ref["sentences"])
    evaluated = {s["sent"] for ref in refs if ref["split"] == "val" for s in ref["sentences"]}
    dataset = load("Refcocog", tree)
    items = [dataset.item(i) for i in range(len(dataset))]
    assert [item.texts[0] for item in items] == [
        sentence["sent"] for ref in refs if ref["split"] == "val" for sentence in ref["sentences"]
    ]
    for item in items:
        own = sentences[item.image_ids[0]]
        assert item.texts[0] in own and not own & set(item.texts[1:])
        assert len(set(item.texts)) == 10 and set(item.texts) <= evaluated


@pytest.mark.parametrize("name", ["Refcocog", "vqa_binary"])
def test_wrong_candidates_depend_on_seed_and_item_alone(tree, name):
    first = load(name, tree)
    order = list(range(len(first)))
    random.Random(0).shuffle(order)
    again = load(name, tree)
    shuffled = {i: again.item(i) for i in order}
    random.seed(5)
    assert all(first.item(i) == shuffled[i] for i in order)
    other = load(name, tree, seed=1)
    assert any(first.item(i) != other.item(i) for i in order)
    assert first.item(0).texts[0] == other.item(0).texts[0]
    assert first.item(0).images[0] == other.item(0).images[0]


def test_wrong_candidates_are_the_same_in_another_process(tree):
    code = (
        "from custom_datasets import get_dataset\n"
        f"for name in ('Refcocog', 'vqa_binary'):\n    print(get_dataset(name, {str(tree[0])!r}, "
        f"data_dir={str(tree[1])!r}).item(4))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [str(load(name, tree).item(4)) for name in ("Refcocog", "vqa_binary")]


def test_too_few_others_is_said(own_tree):
    path = own_tree[1] / "test.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:8]))
    assert "Item 1 of vqa_binary needs 9 wrong candidates" in refusal("vqa_binary", own_tree)


# transform and resize


def test_transform_sees_resized_rgb_pictures(tree):
    def transform(image):
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        return image.size

    assert load("ComVG", tree, transform=transform, resize=24)[0].images == [(24, 24)] * 2
    assert load("Shapes_text", tree, transform=transform, resize=1024)[0].images == [(1024, 1024)]
    assert load("Shapes_text", tree, resize=1024)[0].images[0].size == (512, 512)


# What users get wrong


def test_names_are_found_in_any_case_and_near_ones_are_suggested(tree):
    assert load("refCOCOg", tree).name == "Refcocog"
    text = refusal("ComVG_subj", tree)
    assert "'ComVG_subj': did you mean ComVG_sub" in text and "ShapesShift_text" in text
    assert "choose one of ComVG_sub" in refusal("imagenet", tree)


def test_modes(tree):
    assert "for evaluation choose one of ComVG_sub" in refusal("vqa", tree)
    for name in ("vqa_other", "vqa_binary", "winoground"):
        assert f"{name} is for evaluation only: for training" in refusal(name, tree, mode="train")
    assert "no mode 'test'" in refusal("ComVG", tree, mode="test")


@pytest.mark.parametrize(
    "name, mode, file, source",
    [
        ("ComVG_verb", "eval", "DSD/data/compositional_visual_genome.csv", "eric-ai-lab/ComVG"),
        ("ComVG", "train", "DSD/data/comvg_train.csv", "eric-ai-lab/DSD"),
        ("Refcocog", "eval", "refcocog/refs(google).p", "lichengunc/refer"),
        ("vqa_other", "eval", "DSD/data/vqa_text_test.csv", "eric-ai-lab/DSD"),
        ("vqa", "train", "DSD/data/vqa_text_train.csv", "eric-ai-lab/DSD"),
        ("vqa_binary", "eval", "DSD/data/test.txt", "eric-ai-lab/DSD"),
        ("winoground", "eval", "winoground/examples.jsonl", "facebook/winoground"),
    ],
)
def test_missing_files_are_named_with_their_source(own_tree, name, mode, file, source):
    image = load(name, own_tree, mode=mode)[0].images[0]
    image.unlink()
    text = refusal(name, own_tree, mode=mode)
    assert all(part in text for part in (name, str(image), "https://", "--data_root"))
    (own_tree[0] / file).unlink()
    text = refusal(name, own_tree, mode=mode)
    assert text.startswith(f"{name} needs {own_tree[0] / file}, but it is not there") and source in text


def test_a_damaged_picture_is_named_when_transformed(own_tree):
    path = load("ComVG", own_tree)[0].images[1]
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in refusal("ComVG", own_tree, transform=lambda image: image)


HEAD = "id,sentence,pos_image_id,neg_image_id,neg_value\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "not readable as a UTF-8 CSV file (No columns"),
        (HEAD, "it has no rows"),
        (HEAD.replace("neg_image_id", "negative") + "1,a,2,3,verb\n", "no column neg_image_id"),
        (HEAD + "1,a dog,2,3,verb\n2,a cat,,3,verb\n", "its row 2 has '' as pos_image_id"),
        (HEAD + "1,a dog,2,nan,verb\n", "its row 1 has 'nan' as neg_image_id"),
        (HEAD + "1,a dog,2,3.5,verb\n", "its row 1 has '3.5' as neg_image_id"),
        (HEAD + "1,a dog,2,../x,verb\n", "its row 1 has '../x' as neg_image_id"),
        (HEAD + "1,a dog,2,3,verb\n2, ,4,5,verb\n", "its row 2 has '' as sentence"),
        (HEAD + "1,a dog,2,3\n", "its row 1 has '' as neg_value"),
        (HEAD + "1,a dog,2,3,verb\n2,a cat,4,5,verb,6\n", "not readable as a UTF-8 CSV file"),
        (HEAD + "1,a dog,2,3,subject\n", "no row with verb as neg_value"),
        ((HEAD + "1,a café,2,3,verb\n").encode("latin-1"), "not readable as a UTF-8 CSV file"),
        (HEAD.encode("utf-16"), "not readable as a UTF-8 CSV file"),
    ],
)
def test_damaged_tables_are_explained(own_tree, content, reason):
    path = own_tree[1] / "compositional_visual_genome.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refusal("ComVG_verb", own_tree)
    assert text.startswith(f"ComVG_verb needs {path}, but ") and reason in text
    assert "eric-ai-lab/ComVG" in text


def test_tables_as_other_programs_write_them(own_tree):
    path = own_tree[1] / "compositional_visual_genome.csv"
    lines = HEAD + '1," NA, null",180.0,7,verb\n\n2,nan,8,9.00,verb\n'
    path.write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    dataset = load("ComVG_verb", own_tree)
    assert [dataset.item(i).texts for i in range(2)] == [["NA, null"], ["nan"]]
    assert [dataset.item(i).image_ids for i in range(2)] == [["180", "7"], ["8", "9"]]
    path.write_text("sentence,pos_image_id,neg_image_id\na dog,1,2\n")
    path.rename(own_tree[1] / "comvg_train.csv")  # training on every kind needs no kinds
    assert load("ComVG", own_tree, mode="train").item(0).tags == {}
    assert "no column neg_value" in refusal("ComVG_obj", own_tree, mode="train")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("COCO_val2014_000000000007.jpg The question is asking about yes or no: a? b", "its line 42 is not"),
        ("../../x.jpg*The question is asking about yes or no: a? b", "its line 42 is not"),
        ("COCO_val2014_000000000007.jpg*a? b", "its line 42 is not"),
        ("caf\xe9", "not readable as UTF-8 text"),
    ],
)
def test_damaged_lines_are_numbered(own_tree, line, reason):
    path = own_tree[1] / "test.txt"
    path.write_bytes(path.read_bytes() + b"\n" + line.encode("latin-1") + b"\n")
    text = refusal("vqa_binary", own_tree)
    assert text.startswith(f"vqa_binary needs {path}, but ") and reason in text


def test_files_without_items_are_refused(own_tree):
    root, data_dir = own_tree
    (data_dir / "test.txt").write_text("\n \n")
    assert "it is empty" in refusal("vqa_binary", own_tree)
    (data_dir / "test.txt").write_text("COCO_val2014_000000000007.jpg*The question is asking about others: a? b")
    assert "no yes-or-no sentence" in refusal("vqa_binary", own_tree)
    (root / "winoground" / "examples.jsonl").write_text("")
    assert "it is empty" in refusal("winoground", own_tree)


WHOLE = {"id": 1, "image_0": "a", "image_1": "b", "caption_0": "c", "caption_1": "d"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        *map(json.dumps, [{"id": 1, "image_0": "a"}, WHOLE | {"caption_0": None}, WHOLE | {"image_0": "../a"}]),
    ],
)
def test_damaged_winoground_lines_are_numbered(own_tree, line):
    path = own_tree[0] / "winoground" / "examples.jsonl"
    path.write_text(path.read_text() + line)
    assert f"winoground needs {path}, but its line 2 is not an example" in refusal("winoground", own_tree)


@pytest.mark.parametrize(
    "refs, reason",
    [
        ([], "nothing in its split val"),
        (5, "does not hold a list of references"),
        ({"refs": 1}, "does not hold a list of references"),
        ([{"image_id": 5}], "does not hold a list of references (KeyError('sentences'))"),
        ([{"image_id": "x", "sentences": []}], "does not hold a list of references"),
    ],
)
def test_damaged_references_are_explained(own_tree, refs, reason):
    path = own_tree[0] / "refcocog" / "refs(google).p"
    path.write_bytes(pickle.dumps(refs))
    text = refusal("Refcocog", own_tree)
    assert text.startswith(f"Refcocog needs {path}, but ") and reason in text and "lichengunc" in text


def test_references_that_run_code_are_refused(own_tree):
    path = own_tree[0] / "refcocog" / "refs(google).p"
    path.write_bytes(f"cos\nsystem\n(S'touch {own_tree[0]}/run'\ntR.".encode())
    text = refusal("Refcocog", own_tree)
    assert all(part in text for part in (str(path), "would run code (os.system)", "lichengunc"))
    assert not (own_tree[0] / "run").exists()


def nested_tuples(depth):
    return b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."  # {(((…),),): 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02]r\xff\xff\xff\x3f.", "beyond its own length"),  # would make room for 2^30 objects
        (nested_tuples(200_000), "tuples"),  # Python dies of hashing it
        (b"\x80\x02c__builtin__\nset\n.", "would run code"),  # the type itself, not a set
    ],
)
def test_references_that_would_exhaust_the_process_are_refused(own_tree, content, reason):
    path = own_tree[0] / "refcocog" / "refs(google).p"
    path.write_bytes(content)
    assert reason in refusal("Refcocog", own_tree)


def test_the_table_describes_every_benchmark():
    assert len(BENCHMARKS) == 19
    assert {spec.metrics for spec in BENCHMARKS.values()} == {"accuracy", "recall", "winoground"}
    assert all(spec.description for spec in BENCHMARKS.values())
    readme = (custom_datasets.DATA_DIR / "README.md").read_text()
    for file in ("compositional_visual_genome.csv", "comvg_train.csv", "vqa_text_test.csv", "test.txt"):
        assert file in readme
