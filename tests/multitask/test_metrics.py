"""Accuracies of the classes that are trained and of the others."""

from statistics import harmonic_mean

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, Task
from mmap_peft.multitask.metrics import accuracies, predicted_classes

from ..conftest import make_task


@pytest.mark.parametrize("zero_shot", [False, True])
def test_evaluation_from_base_to_new_classes(zero_shot, clip, processor, arguments):
    """The accuracies are those of `predict` among the base classes and among the new ones."""
    names = make_task("print", 5).class_names
    tasks = [make_task("print", 5, per_class=6, classes_for_training=names[:3]), make_task("photo", 4, per_class=6)]
    classifier = MultiTaskClassifier(
        clip, processor, tasks, MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
    )
    trainer = MultiTaskTrainer(model=classifier, args=arguments(per_device_eval_batch_size=4))
    if zero_shot:
        with classifier.zero_shot():
            metrics = trainer.evaluate()
            expected = by_predict(classifier, tasks[0], names)
    else:
        metrics, expected = trainer.evaluate(), by_predict(classifier, tasks[0], names)
    for part, value in expected.items():
        assert metrics[f"eval_print_accuracy_{part}"] == pytest.approx(value)
        assert metrics[f"eval_mean_accuracy_{part}"] == pytest.approx(value)  # of the one task that has them
    assert not any(name.startswith("eval_photo_accuracy_") for name in metrics)
    found = classifier.record.zero_shot if zero_shot else classifier.record.prompted
    assert set(found) == {"print", "photo"}
    assert metrics["eval_mean_accuracy"] == pytest.approx(np.mean(list(found.values())))


def by_predict(classifier, task, names):
    parts = {}
    for part, chosen in (("base", names[:3]), ("new", names[3:])):
        rows = [row for row in task.eval if names[row["label"]] in chosen]
        found = classifier.predict([row["image"] for row in rows], task.name, class_names=chosen)
        parts[part] = np.mean([label == names[row["label"]] for label, row in zip(found.labels, rows)])
    return {**parts, "harmonic": harmonic_mean(parts.values())}


def test_accuracies_of_a_table_by_hand():
    tasks = {
        "one": Task("one", list("abcd"), classes_for_training=["a", "b"]),
        "two": Task("two", list("abc"), classes_for_training=["a", "c"]),
        "three": Task("three", list("ab")),
    }
    inf = float("-inf")
    rows = [  # logits, label, task
        ([0, 1, 3, 0], 1, 0),  # wrong among all, right among a and b
        ([2, 1, 3, 0], 1, 0),  # wrong, wrong
        ([9, 1, 2, 1], 2, 0),  # wrong, right among c and d
        ([0, 1, 2, 1], 3, 0),  # wrong, wrong
        ([0, 1, 2, inf], 2, 1),  # right, right
        ([0, -9, 2, inf], 1, 1),  # wrong, right: the only one of its kind
        ([1, 0, inf, inf], 0, 2),
        ([1, 0, inf, inf], -100, 2),  # could not be read
        ([1, 0, inf, inf], -100, 0),
    ]
    logits, labels, numbers = zip(*rows)
    label_ids = torch.tensor(labels), torch.tensor(numbers)
    predictions = predicted_classes(torch.tensor(logits, dtype=torch.float), label_ids, tasks)
    assert predictions.shape == (9, 2)
    given = EvalPrediction(predictions.numpy(), tuple(each.numpy() for each in label_ids))
    expected = {
        "one_accuracy": 0,
        "two_accuracy": 0.5,
        "three_accuracy": 1,
        "mean_accuracy": 0.5,
        "worst_accuracy": 0,
        "one_accuracy_base": 0.5,
        "one_accuracy_new": 0.5,
        "one_accuracy_harmonic": 0.5,
        "two_accuracy_base": 1,
        "two_accuracy_new": 1,
        "two_accuracy_harmonic": 1,
        "mean_accuracy_base": 0.75,
        "mean_accuracy_new": 0.75,
        "mean_accuracy_harmonic": 0.75,
    }
    assert accuracies(given, tasks) == pytest.approx(expected)
    parts = [slice(0, 4), slice(4, 9)]
    by_batch = EvalPrediction(
        [given.predictions[part] for part in parts], [[e[part] for e in given.label_ids] for part in parts]
    )
    assert accuracies(by_batch, tasks) == pytest.approx(expected)
    some = EvalPrediction(given.predictions[:2], tuple(each[:2] for each in given.label_ids))  # no new class
    found = accuracies(some, tasks)
    assert found["one_accuracy_base"] == 0.5
    assert not any(name.endswith(("_new", "_harmonic")) for name in found)


def test_predictions_have_one_column_where_all_classes_train():
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = predicted_classes(logits, (torch.tensor([0, 1]), torch.tensor([0, 0])), {"one": Task("one", ["a", "b"])})
    assert found.tolist() == [1, 0]
