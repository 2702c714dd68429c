"""Prompts of all tasks, of a group and of a task together, and the group that a new task finds."""

import logging

import numpy as np
import pytest
import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, Task, TaskGrouping
from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask import affinity
from mmap_peft.multitask.nearest_group import smallest

from ..conftest import load_clip, make_task


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)
GROUPS = [["print", "photo"], ["clipart"]]


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks, CONFIG)


def grouping(groups=GROUPS):
    return TaskGrouping(["print", "clipart", "photo"], groups)


def values(classifier, adapter):
    return torch.cat([parameter.detach().flatten() for parameter in classifier.adapter_parameters(adapter).values()])


def test_every_task_uses_the_prompts_of_all_of_its_group_and_its_own(classifier, clip_folder, tmp_path):
    learned = values(classifier, "global")
    classifier.set_grouping(grouping(), seed=3, keep_global=True)
    assert classifier.routes == {
        "print": ("global", "group_0", "print"),
        "clipart": ("global", "group_1", "clipart"),
        "photo": ("global", "group_0", "photo"),
    }
    assert classifier.adapters == ["global", "group_0", "group_1", "print", "clipart", "photo"]
    assert torch.equal(values(classifier, "global"), learned)
    assert not torch.equal(values(classifier, "group_0"), learned)  # twice the same prompts would say nothing new
    assert len(classifier.training_adapters) == 6
    classifier.save_pretrained(tmp_path / "saved")
    again = MultiTaskClassifier.from_pretrained(tmp_path / "saved", load_clip(clip_folder), classifier.processor)
    assert again.routes == classifier.routes
    image = make_task("print", 3).eval[0]["image"]
    for task in classifier.tasks:
        assert torch.equal(*(each.predict(image, task).probabilities for each in (classifier, again)))


def test_global_and_groups_are_trained_and_resumed(classifier, arguments, clip_folder, processor, tasks):
    fields = {"sharing": "global+groups", "grouping": "given", "given_groups": "print+photo,clipart", "save_steps": 1}
    trainer = MultiTaskTrainer(model=classifier, args=arguments(max_steps=2, **fields))
    trainer.train()
    assert classifier.routes["print"] == ("global", "group_0", "print")
    other = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, CONFIG)
    resumed = MultiTaskTrainer(model=other, args=arguments(max_steps=2, **fields))
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    for adapter in classifier.adapters:
        assert torch.equal(values(classifier, adapter), values(other, adapter))


@pytest.mark.parametrize("keep_global", [False, True])
def test_a_new_task_joins_a_group_by_any_of_its_names(classifier, keep_global):
    classifier.set_grouping(grouping(), keep_global=keep_global)
    first = ("global",) * keep_global
    assert classifier.shared_routes() == {
        **({"global": first} if keep_global else {}),
        "group_0": (*first, "group_0"),
        "group_1": (*first, "group_1"),
    }
    classifier.add_task(make_task("sketch", 3), group="photo")
    classifier.add_task(make_task("sketch", 3, name="second"), group="group_1")
    assert classifier.routes["sketch"] == (*first, "group_0", "sketch")
    assert classifier.routes["second"] == (*first, "group_1", "second")
    assert classifier.grouping.groups == [["print", "photo", "sketch"], ["clipart", "second"]]
    if keep_global:
        classifier.add_task(make_task("sketch", 3, name="third"), group="global")
        assert classifier.routes["third"] == ("global", "third")
        assert classifier.grouping.groups[-1] == ["third"]


def test_a_task_joins_the_group_whose_prompts_know_its_names(processor, arguments):
    """Two families name the same pictures differently, and a new task names them as one of them does."""
    own, other = ["sun", "cloud", "star", "heart"], ["heart", "star", "cloud", "sun"]

    def task(style, names):
        plain = make_task(style, 4, name=f"{style} {names[0]}")
        return Task(plain.name, names, train=plain.train, eval=plain.eval)

    tasks = [task(style, names) for names in (own, other) for style in ("print", "clipart")]
    classifier = MultiTaskClassifier(load_clip(small_clip()), processor, tasks, MmAPConfig(), seed=1)
    names = list(classifier.tasks)
    classifier.set_grouping(TaskGrouping(names, [names[:2], names[2:]]), seed=1)
    classifier.train_adapters(["group_0", "group_1"])  # so that the groups learn the names, and not the tasks
    settings = {"max_steps": 40, "save_strategy": "no", "learning_rate": 0.1, "per_device_train_batch_size": 16}
    MultiTaskTrainer(model=classifier, args=arguments(**settings)).train()
    before, random = classifier.state_dict(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    for names, group in (own, "group_0"), (other, "group_1"):
        found = classifier.nearest_group(task("sketch", names))
        assert found.group == group
        assert found.probability > 0.5 and min(found.losses, key=found.losses.get) == group
    after = classifier.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    added = classifier.add_task(task("sketch", other), group="nearest")
    assert added == classifier.nearest_group(task("sketch", other))
    assert classifier.routes["sketch heart"] == ("group_1", "sketch_heart")


def test_losses_are_those_of_the_task_with_each_groups_prompts(classifier):
    classifier.set_grouping(grouping())
    for name in "group_0", "group_1":
        with torch.no_grad():
            for parameter in classifier.adapter_parameters(name).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    new = make_task("sketch", 3)
    found = classifier.nearest_group(new)
    classifier.add_task(new, group="group_0")
    images = [row["image"] for row in new.train]
    for group, loss in found.losses.items():
        with classifier.override_routes({**classifier.routes, "sketch": (group,)}):
            probabilities = classifier.predict(images, "sketch").probabilities
        true = probabilities[range(len(images)), new.labels("train").tolist()]
        assert loss == pytest.approx(-true.log().mean().item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_how_sure_a_choice_is(seed):
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(3, 60))
    clear = smallest(losses + np.array([[1.0], [0.0], [2.0]]), list("xyz"), rng)
    assert (clear.group, list(clear.losses)) == ("y", list("xyz")) and clear.probability > 0.99
    assert smallest(losses, list("xyz"), rng).probability < 0.99
    shared = losses[:1] + 0.01 * rng.normal(size=(3, 60)) + np.array([[0.0], [0.02], [0.02]])
    assert smallest(shared, list("xyz"), rng).probability > 0.99  # all groups are compared on the same images


@pytest.mark.parametrize(
    ("setup", "fields", "sentence"),
    [
        ("none", {}, "No group is nearest, since there are none; write group=None"),
        ("groups", {"train": None}, "Task 'sketch' has no training images"),
    ],
)
def test_what_no_nearest_group_is_found_for(setup, fields, sentence, classifier):
    if setup == "groups":
        classifier.set_grouping(grouping())
    else:
        classifier.separate_adapters()
    routes, adapters = dict(classifier.routes), classifier.adapters
    with pytest.raises(ValueError, match=sentence):
        classifier.add_task(make_task("sketch", 3, **fields), group="nearest")
    assert (classifier.routes, classifier.adapters) == (routes, adapters)


@pytest.mark.parametrize(("unstable", "count"), [("all", 1), ("none", 3), ("keep", None)])
def test_groups_that_are_not_stable_are_replaced_with_a_warning(
    unstable, count, classifier, arguments, caplog, monkeypatch
):
    monkeypatch.setattr(affinity, "co_membership", lambda *args, **kwargs: (np.eye(3), 0.1))
    monkeypatch.setattr("mmap_peft.multitask.grouping.co_membership", affinity.co_membership)
    logging.getLogger("mmap_peft").propagate = True
    trainer = MultiTaskTrainer(model=classifier, args=arguments(unstable=unstable, max_steps=1, save_strategy="no"))
    with caplog.at_level(logging.WARNING):
        found = trainer.group_tasks()
    assert count is None or len(found.groups) == count
    assert not found.is_stable and found.stability == 0.1
    assert "No stable groups (stability 0.10 is below 0.7" in caplog.text
    classifier.save_pretrained(f"{trainer.args.output_dir}/saved")
    with open(f"{trainer.args.output_dir}/saved/README.md") as card:
        text = card.read()
    assert "No stable groups" in text and "Affinity: directions. Stability of the groups that were found: 0.10" in text
    again = MultiTaskClassifier.from_pretrained(f"{trainer.args.output_dir}/saved", processor=classifier.processor)
    assert again.grouping.to_dict() == found.to_dict()
