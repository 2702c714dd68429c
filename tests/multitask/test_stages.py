"""What is given to a MultiTaskTrainer holds for both stages, or is refused with a sentence."""

import pytest
import torch
from transformers import TrainerCallback

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, TaskGrouping, lora_config
from mmap_peft.multitask.images import collate
from mmap_peft.multitask.task_trainer import TaskTrainer

from ..conftest import load_clip


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)
SHORT = {"max_steps": 3, "grouping_steps": 2, "save_strategy": "no"}


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks, CONFIG)


def values(classifier):
    return [parameter.detach().clone() for parameter in classifier.tasks_by_parameter()]


def sgd(classifier, **settings):
    return torch.optim.SGD(list(classifier.tasks_by_parameter()), **{"lr": 1.0, **settings})


class CountingSGD(torch.optim.SGD):
    steps = []

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.steps.append(0)

    def step(self, *args, **kwargs):
        self.steps[-1] += 1
        return super().step(*args, **kwargs)


class Steps(TrainerCallback):
    counts = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.counts.append(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.counts[-1] += 1


def test_an_optimizers_class_makes_one_in_each_stage(classifier, arguments):
    CountingSGD.steps.clear()
    MultiTaskTrainer(
        model=classifier, args=arguments(**SHORT), optimizer_cls_and_kwargs=(CountingSGD, {"lr": 0.1})
    ).train()
    assert CountingSGD.steps == [2, 3]


@pytest.mark.parametrize("how", ["object", "class", "added"])
def test_callbacks_take_part_in_both_stages(how, classifier, arguments):
    Steps.counts.clear()
    callback = Steps if how == "class" else Steps()
    trainer = MultiTaskTrainer(
        model=classifier, args=arguments(**SHORT), callbacks=None if how == "added" else [callback]
    )
    if how == "added":
        trainer.add_callback(callback)
    trainer.train()
    assert Steps.counts == [2, 3]


def test_a_collator_holds_for_both_stages(classifier, arguments):
    sizes = []

    def collator(items):
        sizes.append(len(items))
        return collate(items)

    MultiTaskTrainer(model=classifier, args=arguments(**SHORT), data_collator=collator).train()
    assert len([size for size in sizes if size == 6]) >= 5


@pytest.mark.parametrize("settings", [{}, {"sharing": "none"}, {"grouping": "all", "grouping_steps": 0}])
def test_an_optimizer_of_adapters_that_are_replaced_is_refused(settings, classifier, arguments):
    trainer = MultiTaskTrainer(
        model=classifier, args=arguments(**{**SHORT, **settings}), optimizers=(sgd(classifier), None)
    )
    before, adapters = values(classifier), list(classifier.adapters)
    with pytest.raises(
        ValueError, match=r"`optimizers` holds the parameters of adapters that are replaced .*optimizer_cls"
    ):
        trainer.train()
    assert classifier.adapters == adapters
    assert all(torch.equal(one, other) for one, other in zip(values(classifier), before))


@pytest.mark.parametrize("settled", ["sharing", "grouping", "alone"])
def test_an_optimizer_of_the_adapters_that_train_is_used(settled, classifier, arguments):
    settings = {**SHORT, "lr_scheduler_type": "constant"}
    if settled == "grouping":
        classifier.set_grouping(TaskGrouping.by_mode("none", list(classifier.tasks)))
    elif settled == "sharing":
        settings["sharing"] = "all"
    optimizer = sgd(classifier)
    kind = TaskTrainer if settled == "alone" else MultiTaskTrainer
    trainer = kind(model=classifier, args=arguments(**settings), optimizers=(optimizer, None))
    before = values(classifier)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert not any(torch.equal(one, other) for one, other in zip(values(classifier), before))


def test_a_scheduler_goes_with_its_optimizer(classifier, arguments):
    optimizer = sgd(classifier)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = values(classifier)
    args = arguments(**SHORT, sharing="all")
    MultiTaskTrainer(model=classifier, args=args, optimizers=(optimizer, scheduler)).train()
    assert all(torch.equal(one, other) for one, other in zip(values(classifier), before))
    with pytest.raises(ValueError, match="a scheduler without its optimizer; give both"):
        MultiTaskTrainer(model=classifier, args=args, optimizers=(None, scheduler)).train()


def test_an_optimizer_of_other_parameters_is_refused(classifier, arguments):
    optimizer = sgd(classifier)
    classifier.set_grouping(TaskGrouping.by_mode("none", list(classifier.tasks)))
    trainer = MultiTaskTrainer(model=classifier, args=arguments(**SHORT), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="holds other parameters than those that train"):
        trainer.train()


def test_a_method_without_a_first_stage_takes_an_optimizer(clip_folder, processor, tasks, arguments):
    classifier = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, lora_config(r=2))
    before = values(classifier)
    MultiTaskTrainer(model=classifier, args=arguments(**SHORT), optimizers=(sgd(classifier), None)).train()
    assert not all(torch.equal(one, other) for one, other in zip(values(classifier), before))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("model_init", "give the classifier as `model`"), ("compute_loss_func", "override `TaskTrainer.compute_loss`")],
)
def test_what_neither_stage_can_use_is_refused(name, sentence, classifier, arguments):
    with pytest.raises(ValueError, match=f"Invalid argument `{name}`: .*{sentence}"):
        MultiTaskTrainer(model=classifier, args=arguments(), **{name: lambda *args: None})
