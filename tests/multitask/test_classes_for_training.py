"""Training on some of a task's classes: its loss, its images, and what it leaves as it was."""

import json
from dataclasses import replace

import datasets
import pytest
import torch

from mmap_peft import CoOpConfig, LinearProbeConfig, MultiTaskClassifier, MultiTaskTrainer, Task, TaskGrouping
from mmap_peft.data.pictograms import draw
from mmap_peft.multitask.consistency import Consistency
from mmap_peft.multitask.images import TaskImages, collate
from mmap_peft.multitask.task_gradients import task_gradients

from ..conftest import load_clip, make_task
from .test_other_classes import METHODS, make


NAMES = ["sun", "cloud", "star", "heart", "umbrella"]
TRAINED = ["heart", "cloud", "sun"]
PLACES = [0, 1, 3]  # of these among the names


def images(names):
    return [{"image": draw("print", name, number), "label": name} for name in names for number in (0, 1)]


def restricted(name="print", **fields):
    return Task(name, NAMES, train=images(NAMES), **{"classes_for_training": TRAINED, **fields})


def only_these(name="print", **fields):
    """A task that has no other classes."""
    names = [NAMES[place] for place in PLACES]
    return Task(name, names, train=images(names), **fields)


def batch(classifier):
    data = TaskImages(classifier.tasks.values(), "train", classifier.processor.image_processor)
    return collate([data[row] for row in range(len(data))])


@pytest.fixture
def pair(request, clip, clip_folder, processor):
    """Makes a classifier of tasks with `classes_for_training`, and one of tasks that have only these classes."""

    def make_pair(method, **fields):
        tasks = [restricted(**fields), Task("all", NAMES, train=images(NAMES))]
        alone = [only_these(**fields), Task("all", NAMES, train=images(NAMES))]
        found = make(clip, processor, method, tasks)
        expected = make(type(clip).from_pretrained(clip_folder), processor, method, alone)
        return found, expected

    return make_pair


def test_only_images_of_these_classes_train(processor):
    class Own:
        """A sequence of one's own, whose labels come with the images."""

        def __len__(self):
            return 10

        def __getitem__(self, number):
            row = images(NAMES)[number]
            return row["image"], row["label"]

    rows = images(NAMES)
    numbers = [{"image": row["image"], "label": NAMES.index(row["label"])} for row in rows]
    data = datasets.Dataset.from_list(numbers)
    changed = data.with_transform(lambda rows: rows)
    for given in (rows, numbers, data, changed, Own()):
        task = Task("print", NAMES, train=given, eval=given, classes_for_training=TRAINED)
        assert task.labels("train").tolist() == [0, 0, 1, 1, 3, 3]
        assert task.labels("eval").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        found = TaskImages([task], "train", processor.image_processor)
        assert found.sizes == [6]
        alone = TaskImages([only_these()], "train", processor.image_processor)
        for row in range(6):
            assert torch.equal(found[row]["pixel_values"], alone[row]["pixel_values"])
            assert found[row]["labels"] == PLACES[alone[row]["labels"]]


@pytest.mark.parametrize("method", [*METHODS, "linear probe"])
def test_the_loss_and_its_gradients_are_those_of_these_classes_alone(method, pair):
    if method == "zero-shot":
        pytest.skip("nothing trains")
    classifier, alone = pair(method)
    if method == "linear probe":
        with torch.no_grad():
            for adapter, rows in (("print", PLACES), ("all", slice(None))):
                for name, parameter in alone.adapter_parameters(adapter).items():
                    parameter.copy_(classifier.adapter_parameters(adapter)[name][rows])
    output, expected = classifier.train()(**batch(classifier)), alone.train()(**batch(alone))
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-5)
    rows = batch(classifier)["task_ids"] == 0
    torch.testing.assert_close(output.logits[rows][:, PLACES], expected.logits[rows][:, :3], atol=1e-4, rtol=1e-5)
    assert (output.logits[rows][:, [2, 4]] == float("-inf")).all()
    output.loss.backward()
    expected.loss.backward()
    for adapter in classifier.adapters:
        for name, parameter in classifier.adapter_parameters(adapter).items():
            gradient, other = parameter.grad, alone.adapter_parameters(adapter)[name].grad
            if method == "linear probe" and adapter == "print":
                assert not gradient[[2, 4]].any()
                gradient = gradient[PLACES]
            if gradient is not None:
                torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ["mmap", "ivlp", "lora", "linear probe"])
def test_evaluation_is_over_all_classes(method, pair, clip_folder, processor):
    classifier, _ = pair(method)
    whole = make(load_clip(clip_folder), processor, method, [Task("print", NAMES), Task("all", NAMES)])
    given = batch(classifier)
    with torch.no_grad():
        found, expected = classifier.eval()(**given), whole.eval()(**given)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    picture = draw("print", "umbrella", 5)
    assert torch.equal(classifier.predict(picture, "print")[1], whole.predict(picture, "print")[1])


@pytest.mark.parametrize("method", ["mmap", "coop", "vpt", "maple"])
def test_snapshots_compare_the_gradients_that_train(method, pair):
    classifier, alone = pair(method)
    found, losses = task_gradients(classifier, "global", [batch(classifier)])
    expected, of_alone = task_gradients(alone, "global", [batch(alone)])
    torch.testing.assert_close(losses, of_alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    classifier.zero_grad()
    parts = classifier.train()(**{name: part[:6] for name, part in batch(classifier).items()})
    (parts.loss * 6).backward()
    gradient = torch.cat([each.grad.flatten() for each in classifier.adapter_parameters("global").values()])
    torch.testing.assert_close(found[0].float(), gradient, atol=1e-5, rtol=1e-3)


def test_texts_of_some_classes_do_not_change_those_of_others(pair):
    classifier, alone = pair("ivlp", class_texts={"cloud": "a grey cloud"})
    found, expected = (each.train()(**batch(each)).loss for each in (classifier, alone))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_nearest_group_and_prototypes_use_these_images_and_classes(pair):
    classifier, alone = pair("mmap")
    for each in (classifier, alone):
        each.set_grouping(TaskGrouping(["print", "all"], [["print"], ["all"]]))
        with torch.no_grad():
            for adapter in ("group_0", "group_1"):
                generator = torch.Generator().manual_seed(len(adapter) + int(adapter[-1]))
                for parameter in each.adapter_parameters(adapter).values():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found, expected = classifier.nearest_group(restricted("new")), alone.nearest_group(only_these("new"))
    assert found.group == expected.group
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    for each in (classifier, alone):
        each.compute_prototypes()
    features = classifier.prototypes.features["print"]
    assert torch.equal(features[PLACES], alone.prototypes.features["print"])
    assert not features[[2, 4]].any()


def test_rows_of_a_probe_keep_their_start(clip, processor, arguments):
    classifier = MultiTaskClassifier(clip, processor, [restricted()], LinearProbeConfig())
    start = {name: each.detach().clone() for name, each in classifier.adapter_parameters("print").items()}
    MultiTaskTrainer(model=classifier, args=arguments(learning_rate=0.1)).train()
    for name, parameter in classifier.adapter_parameters("print").items():
        assert torch.equal(parameter[[2, 4]], start[name][[2, 4]])
        assert (parameter[PLACES] != start[name][PLACES]).any(dim=-1).all()
    trained = {name: each.detach().clone() for name, each in classifier.adapter_parameters("print").items()}
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 would also shrink the rows of probes"):
        MultiTaskTrainer(model=classifier, args=arguments(weight_decay=0.1)).train()
    for name, parameter in classifier.adapter_parameters("print").items():
        assert torch.equal(parameter, trained[name])


def test_training_resumes_with_the_same_classes_only(clip, processor, arguments):
    classifier = MultiTaskClassifier(clip, processor, [restricted()], LinearProbeConfig())
    trainer = MultiTaskTrainer(model=classifier, args=arguments())
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-4"
    trainer.train(resume_from_checkpoint=checkpoint)
    classifier.tasks["print"].classes_for_training = ["sun", "star", "umbrella"]
    with pytest.raises(ValueError, match="so the images would come in another order"):
        MultiTaskTrainer(model=classifier, args=arguments()).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("method", ["mmap", "linear probe"])
def test_a_folder_gives_them_back(method, pair, clip, tmp_path):
    classifier, _ = pair(method)
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path, verify=False, model=None)
    assert again.tasks["print"].classes_for_training == TRAINED
    assert again.tasks["all"].classes_for_training is None
    card = (tmp_path / "README.md").read_text()
    assert "Only these were trained: heart, cloud, sun." in card
    assert card.count("Only these") == 1
    description = json.loads((tmp_path / "tasks.json").read_text())
    for task in description["tasks"]:
        del task["classes_for_training"]
    (tmp_path / "tasks.json").write_text(json.dumps(description))  # as by an early version
    old = MultiTaskClassifier.from_pretrained(tmp_path, verify=False)
    assert old.tasks["print"].classes_for_training is None


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (["sun", "bed"], "'print' has 'bed' in `classes_for_training`, which is none of its classes"),
        (["sun", "Sun"], "in `classes_for_training` of task 'print' are the same or empty after cleaning"),
        (["sun"], "has 1 class in `classes_for_training`; give two or more"),
        ([], "has 0 class in `classes_for_training`"),
        ("sun", "'sun' for `classes_for_training`: expected a list of strings"),
        (["sun", 3], r"3 for `classes_for_training\[1\]`: expected a list of strings"),
        (3, "3 for `classes_for_training`: expected a list"),
    ],
)
def test_wrong_classes_stop_with_a_sentence(chosen, sentence):
    with pytest.raises(ValueError, match=sentence):
        restricted(classes_for_training=chosen)


def test_names_are_cleaned_and_all_classes_are_no_restriction():
    assert restricted(classes_for_training=("SUN", "Umbrella_")).trained_classes == ["sun", "umbrella"]
    assert replace(restricted(), classes_for_training=["sun", "star"]).labels("train").tolist() == [0, 0, 2, 2]
    whole = restricted(classes_for_training=NAMES[::-1])
    assert whole.trains_all_classes
    assert len(whole.labels("train")) == 10


def test_classes_without_images_are_a_warning_and_none_at_all_an_error(caplog):
    rows = images(["sun", "star", "umbrella"])
    Task("print", NAMES, train=rows, classes_for_training=["sun", "heart"]).check_training_images()
    assert "Task 'print' has no training image of 'heart';" in caplog.text
    with pytest.raises(ValueError, match="'print' has training images, but none of its classes_for_training"):
        Task("print", NAMES, train=rows, classes_for_training=["cloud", "heart"]).check_training_images()


def test_contexts_of_classes_are_refused(clip, processor):
    config = CoOpConfig(num_prompts=2, num_classes=5)
    with pytest.raises(ValueError, match="'print' has classes_for_training, but with num_classes=5"):
        MultiTaskClassifier(clip, processor, [restricted()], config)
    classifier = MultiTaskClassifier(clip, processor, [make_task("photo", 5)], config)
    with pytest.raises(ValueError, match="'print' has classes_for_training"):
        classifier.add_task(restricted())
    assert list(classifier.tasks) == ["photo"]


@pytest.mark.parametrize("method", ["mmap", "ivlp"])
def test_consistency_losses_are_those_of_these_classes_alone(method, pair):
    losses = []
    for classifier in pair(method):
        frozen = classifier.frozen_text_features(list(classifier.tasks))
        given = batch(classifier)
        output = classifier.train()(**given, consistency=Consistency(25.0, 10.0, 1.0, frozen))
        losses.append((output.loss, output.consistency))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
