from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from mmap_peft import Task
from mmap_peft.multitask.images import TaskImages
from mmap_peft.multitask.task import clean_name


NAMES = ["Bed", "Desk_Lamp", "Sofa"]
LABELS = [2, 0, 1, 1]


@pytest.fixture
def arrays():
    return np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), np.uint8)


@pytest.fixture
def paths(arrays, tmp_path):
    files = [str(tmp_path / f"{number}.png") for number in range(4)]
    for file, array in zip(files, arrays):
        Image.fromarray(array).save(file)
    return files


class Pairs:
    """A data set as those of torchvision."""

    def __init__(self, images, labels):
        self.images, self.targets, self.visits = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        self.visits += 1
        return Image.open(self.images[number]).convert("RGB"), self.targets[number]


class Frame:
    """What is used of a frame of pandas."""

    iloc = None

    def __init__(self, **columns):
        self.columns, self.values = list(columns), columns

    def __getitem__(self, name):
        return np.array(self.values[name])


def dataset(paths, image="image", label="label", feature=None, labels=LABELS):
    features = {image: datasets.Image(), label: feature or datasets.Value("int64")}
    return datasets.Dataset.from_dict({image: paths, label: labels}, features=datasets.Features(features))


FORMS = {
    "rows of paths": lambda paths, arrays: [{"image": p, "label": n} for p, n in zip(paths, LABELS)],
    "rows of bytes": lambda paths, arrays: [{"img": Path(p).read_bytes(), "class": n} for p, n in zip(paths, LABELS)],
    "pairs": lambda paths, arrays: list(zip(map(Image.open, paths), LABELS)),
    "paths and labels": lambda paths, arrays: (paths, LABELS),
    "paths and names": lambda paths, arrays: (paths, ["sofa", "bed", "Desk Lamp", "desk_lamp"]),
    "arrays": lambda paths, arrays: (arrays, np.array(LABELS, np.uint8)),
    "tensors": lambda paths, arrays: (torch.tensor(arrays).movedim(-1, 1), torch.tensor(LABELS)),
    "columns": lambda paths, arrays: {"path": paths, "target": LABELS},
    "frame": lambda paths, arrays: Frame(file=paths, labels=LABELS),
    "torchvision": lambda paths, arrays: Pairs(paths, LABELS),
    "subset": lambda paths, arrays: Subset(Pairs(paths[::-1], LABELS[::-1]), [3, 2, 1, 0]),
    "concatenated": lambda paths, arrays: ConcatDataset([Pairs(paths[:1], LABELS[:1]), Pairs(paths[1:], LABELS[1:])]),
    "tensor data set": lambda paths, arrays: TensorDataset(torch.tensor(arrays), torch.tensor(LABELS)),
    "dataset": lambda paths, arrays: dataset(paths),
    "torch format": lambda paths, arrays: dataset(paths).with_format("torch"),
    "other columns": lambda paths, arrays: dataset(paths, "img", "fine_label"),
    "paths in a dataset": lambda paths, arrays: datasets.Dataset.from_dict({"image_path": paths, "labels": LABELS}),
    "arrays in a dataset": lambda paths, arrays: datasets.Dataset.from_dict({"image": arrays, "label": LABELS}),
    "names in a dataset": lambda paths, arrays: dataset(
        paths, feature=datasets.Value("string"), labels=[NAMES[n] for n in LABELS]
    ),
    "codes": lambda paths, arrays: dataset(paths, feature=datasets.ClassLabel(names=["n01", "n02", "n03"])),
    "dictionary of splits": lambda paths, arrays: datasets.DatasetDict(
        train=dataset(paths), validation=dataset(paths), other=dataset(paths[:1], labels=[0])
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_images(form, paths, arrays, processor):
    rows = FORMS["rows of paths"](paths, arrays)
    expected = TaskImages([Task("art", NAMES, train=rows)], "train", processor.image_processor)
    data = FORMS[form](paths, arrays)
    task = Task("art", NAMES, train=data, eval=data)
    task.check_training_images()
    for split in ("train", "eval"):
        assert task.labels(split).tolist() == LABELS
        found = TaskImages([task], split, processor.image_processor)
        assert len(found) == 4
        for number in (0, 1, 2, 3, 0):
            assert torch.equal(found[number]["pixel_values"], expected[number]["pixel_values"])
            assert found[number]["labels"] == LABELS[number]


def test_labels_are_read_without_images(paths):
    data = Pairs(paths, LABELS)
    assert Task("art", NAMES, train=data).labels("train").tolist() == LABELS
    assert Task("art", NAMES, train=Subset(data, [1])).labels("train").tolist() == [0]
    assert not data.visits


def test_labels_that_only_come_with_images_are_checked_when_training_starts(paths):
    data = ConcatDataset([Pairs(paths, [0, 1, 2, 3])])
    task = Task("art", NAMES, train=data)
    with pytest.raises(ValueError, match="run from 0 to 3, but it has 3 class names"):
        task.check_training_images()


class Drawn:
    """Draws another picture at each visit."""

    def __init__(self):
        self.visits = 0

    def __len__(self):
        return 1

    def __getitem__(self, number):
        self.visits += 1
        return {"image": Image.new("RGB", (9, 9), (9 * self.visits, 0, 0)), "label": 1}


def test_what_draws_anew_is_asked_at_each_visit(paths, processor):
    drawn = Drawn()

    def transform(batch):
        return {"image": [drawn[0]["image"] for _ in batch["image"]]}

    data = dataset(paths)
    data.set_transform(transform)
    for task in (Task("art", NAMES, train=drawn), Task("art", NAMES, train=data)):
        images = TaskImages([task], "train", processor.image_processor)
        assert not torch.equal(images[0]["pixel_values"], images[0]["pixel_values"])
    assert task.labels("train").tolist() == LABELS


def test_a_broken_file_behind_a_transform_is_named(paths, processor):
    Path(paths[1]).write_bytes(b"text")
    data = dataset(paths)
    data.set_transform(lambda batch: batch)
    images = TaskImages([Task("art", NAMES, train=data)], "train", processor.image_processor)
    with pytest.raises(ValueError, match=r"Image .*1\.png of task 'art' cannot be read"):
        images[1]


def stream():
    yield {"image": None, "label": 0}


ROW = {"image": None, "label": 0}
WRONG = {
    "generator": (stream(), r"list\(\) of a generator"),
    "streaming": (datasets.IterableDataset.from_generator(stream), "without streaming"),
    "folder": ("images/art", "read_folder"),
    "number": (5, "can be counted"),
    "set": ({"a.png"}, "can be counted"),
    "array": (np.zeros((2, 4, 4, 3)), "can be counted"),
    "no label": ([{"image": "a.png"}], "none of label, labels"),
    "paths alone": (["a.png", "b.png"], "pairs"),
    "more labels": ((["a.png"], [0, 1]), "1 images with 2 labels"),
    "no columns": ({"a": [1]}, "none of image, img"),
    "splits": (datasets.DatasetDict(a=datasets.Dataset.from_list([ROW])), r"choose one, such as train=data\['a'\]"),
    **{
        repr(label)[:9]: (
            [{"image": None, "label": label}],
            "expected the number of a class, from 0 to 2, or its name",
        )
        for label in (1.5, 1.0, "a", None, True, float("nan"), [0], np.bool_(True), torch.tensor(0.5))
    },
    "2**63": ([{"image": None, "label": 2**63}], "run from 9223372036854775808 to"),
    "-1": (([None], np.array([-1])), "run from -1 to -1"),
    "null": (datasets.Dataset.from_dict({"image": [1, 1], "label": [0, None]}), "Invalid label None"),
    "bools": (datasets.Dataset.from_dict({"image": [1, 1], "label": [True, False]}), "Invalid label"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_forms_stop_with_a_sentence(wrong):
    data, sentence = WRONG[wrong]
    with pytest.raises(ValueError, match=sentence) as caught:
        Task("art", NAMES, train=data)
    assert "train images of task 'art'" in str(caught.value)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("names", [["Desk Lamp", "Bed", "Sofa"], ["bed", "n02", "n03"], ["n01", "n02"]])
def test_names_of_labels_that_are_others_than_the_classes_are_refused(names, paths):
    data = dataset(paths[:1], feature=datasets.ClassLabel(names=names), labels=[0])
    with pytest.raises(ValueError, match="in the same order"):
        Task("art", NAMES, train=data)


@pytest.mark.parametrize(
    ("raw", "clean"), [("Cafe\u0301", "caf\u00e9"), ("be\u200bd", "bed"), ("\u202ebed", "bed"), ("\u00c5", "\u00e5")]
)
def test_names_in_unicode_are_cleaned(raw, clean):
    assert clean_name(raw) == clean == clean_name(clean)


BAD_FIELDS = [
    *({"class_names": value} for value in ("sun", {"a": 0, "b": 1}, {"a"}, b"ab", None, 5, ["a", 1], ["a", None])),
    *({"class_names": ["a", value]} for value in ("", "\u200b", "\x00", "A", "a\u200b", "\ud800")),
    {"class_names": ["\u00e9", "e\u0301"]},
    *(
        {"template": value}
        for value in ("{} {x}", "{0}", "{{}}", "{", "{} }", "{} {}", "", 5, None, [], ["{}", 1], b"{}")
    ),
    {"template": "\ud800 {}"},
    *(
        {"class_texts": value}
        for value in (None, "a", [], {"a": 5}, {"a": []}, {"a": ["b", 1]}, {1: "a"}, {"A": "x", "a": "y"})
    ),
    *({"dataset": value} for value in (5, ["a"], b"a")),
    *({"name": value} for value in (5, None, b"art", ["art"], "\ud800")),
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=ascii)
def test_wrong_settings_stop_with_a_sentence_that_names_them(fields):
    with pytest.raises(ValueError) as caught:
        Task(**{"name": "art", "class_names": ["a", "b"], **fields})
    text = str(caught.value)
    word = {"class_names": "lass", "template": "emplate", "class_texts": "texts"}.get(*fields, *fields)
    assert word in text and len(text) <= 500 and text.isprintable()
    assert "name" in fields or "'art'" in text


@pytest.mark.parametrize("names", [("a", "b"), np.array(["a", "b"]), iter(["a", "b"])])
def test_class_names_in_other_sequences(names):
    assert Task("art", names).class_names == ["a", "b"]
