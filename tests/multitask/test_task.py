import datasets
import pytest

from mmap_peft import Task
from mmap_peft.multitask.task import clean_name


ROWS = [{"image": None, "label": number} for number in (0, 1, 1)]


@pytest.mark.parametrize(
    ("raw", "clean"), [("Alarm_Clock", "alarm clock"), ("TV", "tv"), (" paint-can ", "paint can"), ("a__b", "a b")]
)
def test_names_are_cleaned(raw, clean):
    assert clean_name(raw) == clean


def test_texts_come_from_templates_or_are_free():
    task = Task(
        "art",
        ["Alarm_Clock", "Bed"],
        template=["a photo of a {}.", "a {}"],
        class_texts={"bed": "furniture to sleep in"},
    )
    assert task.texts == [("a photo of a alarm clock.", "a alarm clock"), ("furniture to sleep in",)]


def test_the_adapter_is_named_after_the_task():
    assert Task("Real World", ["x", "y"]).adapter == "real_world"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"class_names": ["bed"]}, "'art' has 1 class"),
        (
            {"class_names": ["Alarm_Clock", "alarm clock", "bed"]},
            "'art' are the same or empty after cleaning: 'Alarm_Cl",
        ),
        ({"class_names": ["bed", "_"]}, "empty after cleaning"),
        ({"template": "a photo"}, "of task 'art' must hold {} once"),
        ({"class_texts": {"sofa": "x"}}, "'art' has texts for 'sofa'"),
        ({"train": [{"image": None, "label": 2}]}, "run from 2 to 2, but it has 2 class names"),
        ({"name": "!"}, "of which no adapter name is left"),
    ],
)
def test_wrong_tasks_stop_with_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Task(**{"name": "art", "class_names": ["bed", "lamp"], **fields})


def test_labels_of_a_dataset_stand_for_its_names_in_its_order():
    features = datasets.Features({"label": datasets.ClassLabel(names=["Desk_Lamp", "Bed"])})
    data = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
    assert Task("art", ["desk lamp", "bed"], train=data).labels("train").tolist() == [0, 1]
    with pytest.raises(ValueError, match="in the same order"):
        Task("art", ["bed", "desk lamp"], train=data)


def test_tasks_without_training_images_stop_with_a_sentence_and_classes_with_a_warning(caplog):
    Task("art", ["bed", "lamp"], train=ROWS).check_training_images()
    assert not caplog.records
    Task("art", ["bed", "lamp", "sofa"], train=ROWS).check_training_images()
    assert "Task 'art' has no training image of 'sofa'" in caplog.text
    with pytest.raises(ValueError, match="'art' has no training images"):
        Task("art", ["bed", "lamp"]).check_training_images()
