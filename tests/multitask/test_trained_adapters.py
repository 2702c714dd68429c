"""Adapters that hold training results are never replaced, unless the caller says so."""

import itertools
import logging

import pytest
import torch

from mmap_peft import LinearProbeConfig, MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, TaskGrouping, lora_config
from mmap_peft.data.pictograms import draw

from ..conftest import load_clip, make_task


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)
IMAGES = [draw("print", "sun", number) for number in range(2)]
LAYOUTS = {
    "all": (CONFIG, {"sharing": "all"}),
    "none": (CONFIG, {"sharing": "none"}),
    "groups": (CONFIG, {"grouping": "all", "grouping_steps": 0}),
    "probes": (LinearProbeConfig(), {}),
}


def answers(classifier, names=None):
    return {name: classifier.predict(IMAGES, name).probabilities for name in names or classifier.tasks}


def parameters(classifier):
    named = {adapter: classifier.adapter_parameters(adapter) for adapter in classifier.adapters}
    return {(a, name): p.detach().clone() for a, found in named.items() for name, p in found.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def train(arguments):
    def run(classifier, **fields):
        trainer = MultiTaskTrainer(
            model=classifier, args=arguments(**{"max_steps": 2, "save_strategy": "no", **fields})
        )
        trainer.train()
        return classifier

    return run


@pytest.fixture
def make(clip_folder, processor, tasks):
    def classifier(config=CONFIG):
        return MultiTaskClassifier(load_clip(clip_folder), processor, tasks, config)

    return classifier


# All combinations for groups; for the other layouts each value once.
CASES = [("groups", *case) for case in itertools.product([True, False], [True, False], ["old", "default"])]
CASES += [
    (layout, *case)
    for layout in ("all", "none", "probes")
    for case in ((True, False, "default"), (False, True, "old"))
]


@pytest.mark.parametrize(("layout", "reloaded", "images_at_hand", "settings_given"), CASES)
def test_an_added_task_trains_alone(layout, reloaded, images_at_hand, settings_given, make, train, tasks, tmp_path):
    config, settings = LAYOUTS[layout]
    classifier = train(make(config), **settings)
    if reloaded:
        classifier.save_pretrained(tmp_path / "saved")
        classifier = MultiTaskClassifier.from_pretrained(tmp_path / "saved", processor=classifier.processor)
    for task in tasks:
        classifier.tasks[task.name].train = task.train if images_at_hand else None
    before = answers(classifier)
    classifier.add_task(make_task("sketch", 3))
    trained, new = parameters(classifier), answers(classifier, ["sketch"])
    train(classifier, learning_rate=0.1, **(settings if settings_given == "old" else {}))
    assert_same(answers(classifier, before), before)
    after = parameters(classifier)
    assert after.keys() == trained.keys()
    changed = {adapter for adapter, name in after if not torch.equal(after[adapter, name], trained[adapter, name])}
    assert changed == {"sketch"}
    assert not torch.equal(answers(classifier, ["sketch"])["sketch"], new["sketch"])


@pytest.mark.parametrize("settings", [{"sharing": "all"}, {"sharing": "none"}, {}], ids=["all", "none", "groups"])
@pytest.mark.parametrize("layout", ["all", "none", "groups"])
def test_training_again_goes_on_with_the_same_adapters(layout, settings, make, train, caplog):
    classifier = train(make(), **LAYOUTS[layout][1])
    adapters, routes = list(classifier.adapters), dict(classifier.routes)
    before = parameters(classifier)
    with caplog.at_level(logging.WARNING):
        train(classifier, learning_rate=1e-9, **settings)
    assert (classifier.adapters, classifier.routes) == (adapters, routes)
    for key, value in parameters(classifier).items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)
    another = settings.get("sharing", "groups") != layout
    assert ("asks for other adapters than the classifier has" in caplog.text) == another


def test_grouping_trained_adapters_needs_the_callers_word(make, train, arguments):
    classifier = train(make(), sharing="all")
    before = answers(classifier)
    trainer = MultiTaskTrainer(model=classifier, args=arguments())
    with pytest.raises(
        ValueError, match=r"adapters global hold training results.*write classifier.reset_adapters\(\)"
    ):
        trainer.group_tasks()
    assert_same(answers(classifier), before)
    classifier.reset_adapters()
    assert classifier.trained_adapters == set()
    assert trainer.group_tasks().mode == "gradient"
    assert classifier.trained_adapters == set()  # stage 1 is no result
    trainer.train()
    assert classifier.trained_adapters == set(classifier.adapters) > {"print", "clipart", "photo"}


@pytest.mark.parametrize("config", [CONFIG, LinearProbeConfig(), lora_config(r=2)], ids=["prompts", "probes", "lora"])
def test_reset_adapters_are_those_of_a_new_classifier(config, make, train):
    classifier, new = make(config), make(config)
    train(classifier, sharing="groups", grouping_steps=2, learning_rate=0.1)
    assert classifier.trained_adapters == set(classifier.adapters)
    classifier.reset_adapters()
    assert (classifier.adapters, classifier.routes, classifier.grouping) == (new.adapters, new.routes, None)
    assert_same(parameters(classifier), parameters(new))
    assert_same(answers(classifier.eval()), answers(new.eval()))
    assert classifier.training_tasks == new.training_tasks
    assert not classifier.record.settings
    train(classifier, grouping_steps=2)


def test_a_zero_shot_classifier_has_no_adapters_to_reset(make):
    with pytest.raises(ValueError, match="has no adapters to reset"):
        make(None).reset_adapters()


@pytest.mark.parametrize("sharing", ["all", "none", "groups"])
@pytest.mark.parametrize("wrong", ["no images", "small batch"])
def test_what_is_wrong_is_said_before_an_adapter_changes(sharing, wrong, make, arguments):
    classifier = make()
    classifier.set_grouping(TaskGrouping.by_mode("none", list(classifier.tasks)))
    if sharing == "groups":
        classifier.share_one_adapter()
    before, routes = parameters(classifier), dict(classifier.routes)
    size = 2 if wrong == "small batch" else 6
    trainer = MultiTaskTrainer(model=classifier, args=arguments(sharing=sharing, per_device_train_batch_size=size))
    if wrong == "no images":
        classifier.tasks["clipart"].train = None
    with pytest.raises(ValueError, match=r"has no training images|does not hold every one"):
        trainer.train()
    assert_same(parameters(classifier), before)
    assert classifier.routes == routes
    assert classifier.trained_adapters == set()


def test_a_task_that_was_added_after_the_trainer_was_made(make, arguments):
    classifier = make()
    trainer = MultiTaskTrainer(model=classifier, args=arguments(sharing="all"))
    classifier.add_task(make_task("sketch", 3))
    with pytest.raises(ValueError, match=r"has no training images of task 'sketch'.*make a new trainer"):
        trainer.train()


def state(classifier):
    return {
        "tasks": dict(classifier.tasks),
        "routes": dict(classifier.routes),
        "adapters": list(classifier.adapters),
        "grouping": None if classifier.grouping is None else classifier.grouping.to_dict(),
        "texts": dict(classifier.texts._ids),
        "training": [(name, parameter.requires_grad) for name, parameter in classifier.named_parameters()],
        "modules": [name for name, _ in classifier.named_modules()],
    }


LONG = "a photo of a {} that nobody has ever seen, on a wall, in a house, in a street, in a town, in a country"
REFUSED = {
    "a taken name": ({"style": "sketch", "name": "Print"}, None, "would both have the adapter 'print'"),
    "the same name": ({"style": "sketch", "name": "print"}, None, "would both have the adapter 'print'"),
    "a group's name": ({"style": "sketch", "name": "group 7"}, None, "a name that is kept"),
    "the name of the mean": ({"style": "sketch", "name": "Mean"}, None, "a name that is kept"),
    "a text that is too long": ({"style": "sketch", "template": LONG}, None, "write a shorter template"),
    "no such group": ({"style": "sketch"}, "nowhere", "'nowhere' is no group or task"),
    "a task's adapter for a group": ({"style": "sketch"}, "lonely", "Task 'lonely' is in no group"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_task_leaves_nothing_behind(why, make, tmp_path):
    fields, group, sentence = REFUSED[why]
    classifier = make()
    classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))
    classifier.add_task(make_task("photo", 3, name="lonely"))
    before, answered = state(classifier), answers(classifier)
    with pytest.raises(ValueError, match=sentence):
        classifier.add_task(make_task(classes=3, **fields), group=group)
    assert state(classifier) == before
    classifier.save_pretrained(tmp_path / "saved")
    again = MultiTaskClassifier.from_pretrained(tmp_path / "saved", processor=classifier.processor)
    assert_same(answers(again), answered)
    classifier.add_task(make_task("sketch", 4), group="print")  # and a good one still fits
    assert classifier.routes["sketch"] == ("group_0", "sketch")


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_the_group_of_a_task_without_groups(sharing, make):
    classifier = make()
    if sharing == "none":
        classifier.separate_adapters()
        with pytest.raises(ValueError, match=r"Task 'print' is in no group.*write group=None"):
            classifier.add_task(make_task("sketch", 3), group="print")
    else:
        classifier.add_task(make_task("sketch", 3), group="print")
        assert classifier.routes["sketch"] == ("global", "sketch")


def test_adding_a_task_a_second_time_leaves_the_first(make):
    classifier, task = make(), make_task("sketch", 3)
    classifier.add_task(task)
    with pytest.raises(ValueError, match="would both have the adapter 'sketch'"):
        classifier.add_task(task)
    assert classifier.tasks["sketch"] is task and classifier.routes["sketch"] == ("sketch",)


def test_the_optimizer_of_an_earlier_training_is_not_used_for_other_adapters(make, arguments):
    classifier = make()
    trainer = MultiTaskTrainer(model=classifier, args=arguments(sharing="all", max_steps=2))
    trainer.train()
    classifier.reset_adapters()
    before = parameters(classifier)
    trainer.train()
    assert not torch.equal(parameters(classifier)["global", "source"], before["global", "source"])
