"""Suites on small local copies: what is read, which images train, and what is refused."""

import datasets
import numpy as np
import pytest

from mmap_peft.data.splits import split_at_random
from mmap_peft.data.suites import Suite, SuiteTask

from .suite_copies import picture, write_copy


NAMES = ["Alley", "Corn_Field", "T - shirt / top"]
TRAIN, TEST = [0, 1, 2, 2, 1, 0, 0, 1, 2], [2, 0, 1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def made(tmp_path, kind=NAMES, train=TRAIN, test=TEST, columns=None, **fields):
    """The images of a task of a copy that is written."""
    folder = write_copy(tmp_path / "copy", train, test, kind, **(columns or {}))
    return SuiteTask("some", "a {}.", str(folder), **fields).read()


def test_columns_names_and_places(tmp_path):
    data = made(tmp_path)
    assert data.features["label"].names == ["alley", "corn field", "t shirt / top"]
    assert data["label"][:] == TRAIN + TEST
    assert data["split"][:] == 9 * ["train"] + 3 * ["test"]
    assert data["file"][:] == [f"train/{row}" for row in range(9)] + [f"test/{row}" for row in range(3)]
    for row, number in ((4, 4), (10, 1)):
        assert np.array_equal(np.asarray(data[row]["image"]), np.asarray(picture(9 * number)))


@pytest.mark.parametrize(
    ("kind", "train", "test", "columns"),
    [
        ("bool", [False, True, True], [True, False], {}),
        ("int64", [0, 1, 1], [1, 0], {"image": "jpg", "label": "cls"}),
        (["a", "b"], [0, 1, 1], [1, 0], {"image": "img"}),
    ],
)
def test_names_and_columns_of_the_suite(kind, train, test, columns, tmp_path):
    data = made(tmp_path, kind, train, test, columns, class_names=["lymph node", "tumor tissue"], **columns)
    assert data.features["label"].names == ["lymph node", "tumor tissue"]
    assert data["label"][:] == [0, 1, 1, 1, 0]
    assert set(data.column_names) == {"image", "label", "file", "split"}


def test_names_are_replaced_and_classes_left_out(tmp_path):
    data = made(tmp_path, rename={"corn_field": "field of corn"}, leave_out=["Alley"])
    assert data.features["label"].names == ["field of corn", "t shirt / top"]
    assert data["label"][:] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert data["file"][:3] == ["train/1", "train/2", "train/3"]  # numbered as in the data set


def test_other_splits(tmp_path):
    folder = write_copy(tmp_path / "copy", TRAIN, [], NAMES, validation=TEST, more=[1])
    data = SuiteTask("some", "a {}.", str(folder), train="train+more", test="validation").read()
    assert data["split"][:] == 10 * ["train"] + 3 * ["test"]
    assert data["label"][:] == [*TRAIN, 1, *TEST]


def suite(tmp_path):
    tasks = [SuiteTask("first", ["a {}.", "the {}."], "me/first"), SuiteTask("second", "{} texture.")]
    for task in tasks:
        write_copy(tmp_path / task.name, 4 * TRAIN, TEST, NAMES)
    return Suite("two", tasks), {task.name: tmp_path / task.name for task in tasks}


def test_shots_fractions_and_all_images(tmp_path):
    two, paths = suite(tmp_path)
    for amount, trained in (({"shots": 2}, 6), ({"fraction": 0.25}, 9), ({"fraction": 1.0}, 36), ({}, 36)):
        tasks = two.load(**amount, paths=paths)
        assert [task.name for task in tasks] == ["first", "second"]
        assert [task.dataset for task in tasks] == ["me/first", None]
        assert tasks[0].texts[1] == ("a corn field.", "the corn field.") and tasks[1].texts[0] == ("alley texture.",)
        for task in tasks:
            assert np.bincount(task.labels("train")).tolist() == 3 * [trained // 3]
            assert task.labels("eval").tolist() == TEST


def test_the_seed_decides_which_images_train_and_which_validate(tmp_path):
    two, paths = suite(tmp_path)

    def files(**options):
        return [(task.train["file"][:], task.eval["file"][:]) for task in two.load(shots=6, paths=paths, **options)]

    assert files(seed=1) == files(seed=1) != files(seed=2)
    assert files(seed=1, validation=0.5) == files(seed=1, validation=0.5) != files(seed=2, validation=0.5)
    for (train, test), (inner, validation) in zip(files(seed=1), files(seed=1, validation=1 / 3)):
        assert sorted(inner + validation) == sorted(train)  # no test image
        assert (len(inner), len(validation), len(test)) == (12, 6, 3)


def test_what_a_suite_reads_is_split_as_any_other_data(tmp_path):
    two, paths = suite(tmp_path)
    domains = two.read(paths)
    split = split_at_random(domains, shots=1, at_most=2)
    assert {name: len(files) for name, files in split.train.items()} == {"first": 3, "second": 3}
    with pytest.raises(ValueError, match=r"fraction=1\.0 leaves nothing"):
        split_at_random({"first": domains["first"].remove_columns("split")}, 1.0)


BAD_TASKS = [
    ({"name": "Cars"}, "Invalid task name 'Cars': write small letters and digits"),
    ({"name": "../x"}, "Invalid task name '../x'"),
    ({"template": "a photo."}, "Template 'a photo.' of task 'some' must hold {} once"),
    ({"class_names": ["one", "One"]}, "Class names of task 'some' are the same"),
    ({"class_names": [0, 1]}, r"Task 'some': Invalid value 0 for `class_names\[0\]`: expected a string"),
    ({"leave_out": "one"}, "Task 'some': Invalid value 'one' for `leave_out`"),
]


@pytest.mark.parametrize(("fields", "sentence"), BAD_TASKS)
def test_bad_tasks(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SuiteTask(**{"name": "some", "template": "a {}.", **fields})


BAD_DATA = [
    ({"image": "picture"}, r"has columns \['image', 'label', 'key'\], but no 'picture'"),
    ({"label": "fine_label"}, "but no 'fine_label'"),
    ({"image": "key"}, "Column 'key' .* holds no images"),
    ({"kind": "int64"}, "has no names for its classes; write class_names"),
    ({"kind": "int64", "class_names": ["a", "b"]}, "has the label 2, but 2 class names, 0 to 1"),
    ({"kind": "int64", "train": [-2, 0], "test": [1], "class_names": ["a", "b"]}, "has the label -2"),
    ({"kind": "int64", "class_names": ["a", "b", "c", "d"]}, "has 3 different labels, but 4 class names"),
    ({"class_names": ["a", "b"]}, "has 3 classes, but class_names has 2 names"),
    ({"test": [0, -1, None]}, "has no label in row 1 and 1 more of 3 rows"),
    ({"kind": "string", "train": ["cat"], "test": ["cat"], "class_names": ["a", "b"]}, "has the label 'cat'"),
    ({"rename": {"street": "road"}}, "rename of task 'some' has 'street', which is none of its classes"),
    ({"kind": ["Corn_Field", "corn field", "x"]}, "Class names of task 'some' are the same .* after cleaning"),
    ({"rename": {"alley": "corn field"}}, "Class names of task 'some' are the same"),
    ({"leave_out": ["street"]}, "leave_out of task 'some' has 'street'"),
]


@pytest.mark.parametrize(("fields", "sentence"), BAD_DATA)
def test_data_that_does_not_fit(fields, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        made(tmp_path, **fields)


def test_data_that_cannot_be_read(tmp_path):
    folder = write_copy(tmp_path / "copy", TRAIN, TEST, NAMES)
    with pytest.raises(
        ValueError, match=r"Split 'test2' of .* for task 'some' cannot be read .* the folder of a copy"
    ):
        SuiteTask("some", "a {}.", str(folder), test="test2").read()
    with pytest.raises(ValueError, match="for task 'some' cannot be read"):
        SuiteTask("some", "a {}.", "me/some").read(tmp_path / "nowhere")
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="for task 'some' cannot be read"):
        SuiteTask("some", "a {}.", str(folder)).read()
    with pytest.raises(ConnectionError, match=r"of 'me/some' for task 'some' cannot be read .* connect to the Hub"):
        SuiteTask("some", "a {}.", "me/some").read()
    with pytest.raises(ValueError, match="Task 'some' has no data set on the Hub; give its folder"):
        SuiteTask("some", "a {}.").read()
    with pytest.raises(ValueError, match="paths has 'other', which is no task of suite 's'"):
        Suite("s", [SuiteTask("some", "a {}.")]).read({"other": folder})
    for tasks in ([], 2 * [SuiteTask("some", "a {}.")]):
        with pytest.raises(ValueError, match="each with a name of its own"):
            Suite("s", tasks)


def test_a_copy_may_lack_the_configuration(tmp_path):
    folder = write_copy(tmp_path / "copy", TRAIN, TEST, NAMES)
    task = SuiteTask("some", "a {}.", "me/some", config="cropped_digits", revision="refs/pr/1")
    assert len(task.read(folder)) == 12
