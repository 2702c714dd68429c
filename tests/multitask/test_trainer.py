import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainerCallback, TrainingArguments

from mmap_peft import (
    CoOpConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Task,
    TaskGrouping,
)
from mmap_peft.multitask.affinity import AFFINITIES, affinity_matrix
from mmap_peft.multitask.grouping_stage import SharedAdapterTrainer

from ..conftest import load_clip, make_task


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)


@pytest.fixture
def make(clip_folder, processor, tasks, arguments):
    """Makes a trainer of a fresh classifier."""

    def trainer(own_tasks=None, **fields):
        more = {name: fields.pop(name) for name in ("callbacks",) if name in fields}
        clip = load_clip(clip_folder)
        classifier = MultiTaskClassifier(clip, processor, own_tasks or tasks, CONFIG)
        return MultiTaskTrainer(model=classifier, args=arguments(**fields), **more)

    return trainer


def prompts(trainer):
    model = trainer.model
    return {(a, name): p.detach().clone() for a in model.adapters for name, p in model.adapter_parameters(a).items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Stop(TrainerCallback):
    """Ends training as a crash would, at one step of one stage."""

    def __init__(self, step, steps):
        self.step, self.steps = step, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.max_steps == self.steps:
            raise KeyboardInterrupt


class Count(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_training_groups_tasks_and_lowers_the_loss(make, pictures):
    counter = Count()
    trainer = make(max_steps=40, learning_rate=0.1, callbacks=[counter])
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    grouping = trainer.model.grouping
    assert grouping.mode == "gradient"
    assert grouping.steps == [1, 4]
    assert grouping.snapshots.shape == (2, 3, 3)
    assert sorted(trainer.model.adapters) == sorted(
        [f"group_{number}" for number in range(len(grouping.groups))] + ["print", "clipart", "photo"]
    )
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before - 0.01
    assert counter.steps == 44  # both stages
    written = Path(trainer.args.output_dir) / "grouping"
    assert TaskGrouping.load(written / "grouping.json").groups == grouping.groups
    assert (written / "grouping.png").stat().st_size > 10_000


def test_only_prompts_are_trained(make, clip_folder):
    trainer = make(max_steps=2)
    trainer.train()
    before = load_clip(clip_folder).state_dict()
    after = trainer.model.clip.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(make):
    first, again, other = make(), make(), make(seed=1)
    for trainer in (first, again, other):
        trainer.train()
    assert_equal(prompts(first), prompts(again))
    assert np.array_equal(first.model.grouping.similarity, again.model.grouping.similarity)
    assert not torch.equal(
        first.model.adapter_parameters("print")["source"], other.model.adapter_parameters("print")["source"]
    )


def test_evaluation_names_every_task_their_mean_and_the_worst(make):
    trainer = make()
    metrics = trainer.evaluate()
    accuracies = [metrics[f"eval_{name}_accuracy"] for name in ("print", "clipart", "photo")]
    assert metrics["eval_mean_accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["eval_worst_accuracy"] == min(accuracies)
    for name, accuracy in zip(("print", "clipart", "photo"), accuracies):
        task = trainer.model.tasks[name]
        labels = trainer.model.predict([row["image"] for row in task.eval], name).labels
        truth = [task.class_names[row["label"]] for row in task.eval]
        assert accuracy == pytest.approx(np.mean([one == other for one, other in zip(labels, truth)]))


def test_the_trainer_equals_a_loop_written_by_hand(make):
    """Stage 2 with SGD is: mean over the batch of each image's own cross entropy, then a step against its gradient."""
    trainer = make(grouping="all", grouping_steps=0, max_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0,
                   lr_scheduler_type="constant")  # fmt: skip
    trainer.group_tasks()
    start = prompts(trainer)
    trainer.train()
    found = prompts(trainer)
    model, batches = trainer.model, [trainer.model_inputs(batch) for batch in trainer.get_train_dataloader()][:3]
    for (adapter, name), value in start.items():
        model.adapter_parameters(adapter)[name].data.copy_(value)
    model.train()
    for batch in batches:
        model.zero_grad()
        output = model(batch["pixel_values"], batch["task_ids"])
        torch.nn.functional.cross_entropy(output.logits, batch["labels"]).backward()
        with torch.no_grad():
            for adapter in model.adapters:
                for parameter in model.adapter_parameters(adapter).values():
                    parameter -= 0.1 * parameter.grad
    for key, value in prompts(trainer).items():
        torch.testing.assert_close(value, found[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [2])
def test_accumulated_batches_equal_a_large_one(accumulation, make):
    fields = {"max_steps": 3, "optim": "sgd", "learning_rate": 3.0}  # Adam would blow rounding up
    whole = make(per_device_train_batch_size=12, **fields)
    parts = make(per_device_train_batch_size=12 // accumulation, gradient_accumulation_steps=accumulation, **fields)
    whole.train()
    parts.train()
    for key, value in prompts(whole).items():
        torch.testing.assert_close(prompts(parts)[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("stage", "step"), [(1, 3), (2, 3), (2, 5)])
def test_resuming_in_the_middle_of_either_stage_equals_the_uninterrupted_run(stage, step, make, tmp_path):
    fields = {"grouping_steps": 5, "max_steps": 7, "save_steps": 1}
    whole = make(output_dir=str(tmp_path / "whole"), **fields)
    whole.train()
    steps = fields["grouping_steps"] if stage == 1 else fields["max_steps"]
    cut = make(output_dir=str(tmp_path / "cut"), callbacks=[Stop(step, steps)], **fields)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make(output_dir=str(tmp_path / "cut"), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(prompts(resumed), prompts(whole))
    assert resumed.model.routes == whole.model.routes
    assert resumed.model.grouping.to_dict() == whole.model.grouping.to_dict()
    expected = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == expected


def test_a_checkpoint_is_a_whole_classifier(make):
    trainer = make()
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    loaded = MultiTaskClassifier.from_pretrained(folder, processor=trainer.model.processor)
    for key, value in prompts(trainer).items():
        assert torch.equal(loaded.adapter_parameters(key[0])[key[1]], value)
    assert loaded.grouping.to_dict() == trainer.model.grouping.to_dict()
    state = json.loads((folder / "multitask_state.json").read_text())
    assert state == {"sampling": "uniform", "order": {"sizes": [6, 10, 8], "seed": 42, "rows": 24}}
    assert not list(folder.glob("*.bin"))


def test_resuming_with_other_images_or_sampling_stops_with_a_sentence(make, tasks):
    make(max_steps=2).train()
    with pytest.raises(ValueError, match="was trained with sampling=uniform, but now it is proportional"):
        make(max_steps=4, sampling="proportional").train(resume_from_checkpoint=True)
    tasks[0].train = tasks[0].train[:-1]
    with pytest.raises(ValueError, match=r"was trained with order=.* in another order"):
        make(max_steps=4).train(resume_from_checkpoint=True)


def test_nothing_to_resume_from_stops_with_a_sentence(make):
    with pytest.raises(ValueError, match="holds no checkpoint of either stage"):
        make().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"^nowhere is no checkpoint to resume from .*give a folder `checkpoint-"):
        make().train(resume_from_checkpoint="nowhere")


def test_the_best_of_all_adapters_is_loaded_at_the_end(make):
    trainer = make(
        max_steps=6, eval_strategy="steps", eval_steps=2, save_steps=2, learning_rate=0.3,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
        callbacks=[EarlyStoppingCallback(5)],
    )  # fmt: skip
    trainer.train()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    kept = MultiTaskClassifier.from_pretrained(trainer.state.best_model_checkpoint, processor=trainer.model.processor)
    for key, value in prompts(trainer).items():
        assert torch.equal(kept.adapter_parameters(key[0])[key[1]], value)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({"grouping": "all"}, [["print", "clipart", "photo"]]),
        ({"grouping": "none", "grouping_steps": 0}, [["print"], ["clipart"], ["photo"]]),
        ({"grouping": "given", "given_groups": "photo+print, clipart"}, [["photo", "print"], ["clipart"]]),
        ({"grouping_threshold": "-1"}, [["print", "clipart", "photo"]]),
        ({"grouping_threshold": 1.0}, [["print"], ["clipart"], ["photo"]]),
        ({"grouping_threshold": "1.0", "max_groups": 1}, [["print", "clipart", "photo"]]),
    ],
)
def test_ways_to_group(fields, groups, make):
    trainer = make(max_steps=1, **fields)
    assert trainer.group_tasks().groups == groups
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.model.grouping.groups == groups


def test_activation_checkpointing_changes_nothing(make):
    names = ("gradient_checkpointing", "activation_checkpointing")  # up to transformers 5.20, and since
    name = names[hasattr(MultiTaskTrainingArguments, names[1])]
    plain, checkpointed = make(max_steps=3), make(max_steps=3, **{name: True})
    plain.train()
    checkpointed.train()
    assert checkpointed.model.clip.text_model.encoder.layers[0].gradient_checkpointing
    for key, value in prompts(plain).items():
        torch.testing.assert_close(prompts(checkpointed)[key], value, atol=1e-5, rtol=1e-4)


def test_snapshots_leave_training_as_it_would_be(make):
    one, many = make(grouping_snapshots=1), make(grouping_snapshots=4)
    for trainer in (one, many):
        stage = trainer.shared_adapter_trainer()
        stage.train()
    assert_equal(prompts(one), prompts(many))


def test_the_similarity_does_not_depend_on_the_batch_size(make):
    trainer = make(grouping_threshold="0")
    stage = trainer.shared_adapter_trainer()
    assert isinstance(stage, SharedAdapterTrainer)
    whole = stage.snapshot()
    stage._train_batch_size = 2
    again = stage.snapshot()
    for affinity in AFFINITIES:
        found, expected = (affinity_matrix(each, affinity) for each in (again, whole))
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_grouping_again_begins_with_one_global_adapter(make):
    trainer = make(grouping="all", grouping_steps=2)
    trainer.group_tasks()
    trainer.args.grouping = "none"
    assert len(trainer.group_tasks().groups) == 3
    assert trainer.model.adapters == ["group_0", "group_1", "group_2", "print", "clipart", "photo"]


def test_a_loss_that_is_not_finite_names_the_task(make):
    trainer = make(grouping="all", grouping_steps=0)
    trainer.group_tasks()
    with torch.no_grad():
        trainer.model.adapter_parameters("clipart")["source"].fill_(float("nan"))
    with pytest.raises(ValueError, match="The loss is not finite at step 0, from task clipart; lower learning_rate"):
        trainer.train()


@pytest.mark.parametrize(
    "config",
    [MmAPConfig(num_prompts=4), LinearProbeConfig(), CoOpConfig(num_prompts=2, num_classes=3)],
    ids=["mmap", "probe", "coop"],
)
def test_a_class_without_training_images_is_named_and_predicted(config, clip, processor, arguments, caplog):
    task = make_task("print", 3)
    task.train = [row for row in task.train if row["label"] != 1]
    classifier = MultiTaskClassifier(clip, processor, [task, make_task("photo", 3)], config)
    trainer = MultiTaskTrainer(model=classifier, args=arguments(sharing="none"))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "Task 'print' has no training image of 'cloud'" in caplog.text
    assert 0 <= trainer.evaluate()["eval_print_accuracy"] <= 1
    assert (classifier.predict([task.eval[0]["image"]], "print").probabilities > 0).all()


def test_unreadable_files_are_named_in_training(make, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    task = make_task("print", 3)
    task.train[0] = {"image": str(broken), "label": 0}
    with pytest.raises(ValueError, match=r"broken\.jpg of task 'print' cannot be read"):
        make([task, make_task("photo", 3)]).train()
    trainer = make([task, make_task("photo", 3)], unreadable="skip")
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_zero_shot_classifier_cannot_be_trained(clip, processor, tasks, arguments):
    with pytest.raises(ValueError, match="has nothing to train; give the MultiTaskClassifier a config"):
        MultiTaskTrainer(model=MultiTaskClassifier(clip, processor, tasks), args=arguments())


def test_other_models_and_settings_stop_with_a_sentence(clip, processor, tasks, arguments, tmp_path):
    with pytest.raises(TypeError, match="Invalid CLIPModel as `model`: expected a MultiTaskClassifier"):
        MultiTaskTrainer(clip, arguments())
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig())
    for args in ("out", TrainingArguments(str(tmp_path), use_cpu=True)):
        with pytest.raises(TypeError, match="as `args`: expected a MultiTaskTrainingArguments"):
            MultiTaskTrainer(classifier, args)


def test_proportional_sampling_trains(make):
    trainer = make(sampling="proportional", max_steps=2, grouping_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_arguments_from_the_command_line_and_from_yaml(tmp_path):
    parser = HfArgumentParser(MultiTaskTrainingArguments)
    (found,) = parser.parse_args_into_dataclasses(
        ["--grouping_threshold", "0.3", "--max_groups", "2", "--sampling", "proportional", "--use_cpu"]
    )
    assert (found.threshold, found.max_groups, found.sampling) == (0.3, 2, "proportional")
    (tmp_path / "settings.yaml").write_text("grouping: given\ngiven_groups: art+clipart,product\nuse_cpu: true\n")
    (found,) = parser.parse_yaml_file(str(tmp_path / "settings.yaml"))
    assert found.parsed_groups == [["art", "clipart"], ["product"]]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"grouping": "best"}, "grouping='best' is no choice"),
        ({"grouping": "given"}, "needs the groups"),
        ({"grouping_threshold": "high"}, "write a number, or 'mean'"),
        ({"grouping_steps": 3, "grouping_snapshots": 4}, "no more snapshots than steps"),
        ({"grouping_steps": 0}, "takes 2 snapshots in 0 steps"),
    ],
)
def test_wrong_arguments_stop_with_a_sentence(fields, sentence, arguments):
    with pytest.raises(ValueError, match=sentence):
        arguments(**fields)


def test_one_process_uses_one_gpu(arguments):
    args = arguments()
    args._n_gpu = 4
    assert args.n_gpu == 1


def test_a_task_is_added_to_a_loaded_classifier_that_has_no_images(clip, processor, tasks, arguments, tmp_path):
    trained = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    trained.set_grouping(TaskGrouping.by_mode("all", list(trained.tasks)))
    trained.save_pretrained(tmp_path / "saved")
    classifier = MultiTaskClassifier.from_pretrained(tmp_path / "saved")
    assert classifier.training_tasks == ["print", "clipart", "photo"]
    image = tasks[0].train[0]["image"]
    before = {name: classifier.predict(image, name).probabilities for name in classifier.tasks}
    classifier.add_task(make_task("sketch", 3), group="print")
    assert classifier.training_tasks == ["sketch"]
    new = classifier.predict(image, "sketch").probabilities
    MultiTaskTrainer(model=classifier, args=arguments()).train()
    for name, probabilities in before.items():
        assert torch.equal(classifier.predict(image, name).probabilities, probabilities)
    assert not torch.equal(classifier.predict(image, "sketch").probabilities, new)


class Slow(list):
    """Rows that take their time."""

    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)


def test_training_tells_its_share_of_waiting(make):
    shares = []
    for kind in (list, Slow):
        task = make_task("print", 3)
        trainer = make([Task("print", task.class_names, train=kind(task.train))], sharing="none", max_steps=3)
        shares.append(trainer.train().metrics["train_waiting_share"])
        assert trainer.state.log_history[-1]["train_waiting_share"] == shares[-1]
    assert 0 < shares[0] < shares[1] < 1


# Python 3.12 warns of any fork beside threads, which torch has
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_workers_and_no_cache_change_nothing(make):
    found = []
    for fields in ({}, {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}, {"image_cache_gb": 0}):
        trainer = make(sharing="none", max_steps=8, **fields)  # two epochs
        trainer.train()
        found.append(prompts(trainer))
        loader = trainer.get_train_dataloader()
        assert loader.num_workers == fields.get("dataloader_num_workers", 0)
        assert loader.prefetch_factor == fields.get("dataloader_prefetch_factor")
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])
