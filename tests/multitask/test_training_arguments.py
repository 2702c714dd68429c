"""Every argument of transformers.TrainingArguments works, or is refused with a sentence; none is forgotten."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainingArguments

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer

from ..conftest import load_clip


NAMES = {field.name for field in fields(TrainingArguments)}
CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1}
SAVE = {"save_strategy": "steps", "save_steps": 1}

# A value, what else is needed, and what can be seen of it after two steps.
WORKS = {
    "output_dir": ({}, lambda trainer: Path(trainer.args.output_dir).is_dir()),
    "per_device_train_batch_size": (
        {"per_device_train_batch_size": 12},
        lambda trainer: trainer.state.train_batch_size == 12,
    ),
    "num_train_epochs": ({"num_train_epochs": 0.5, "max_steps": -1}, lambda trainer: trainer.state.max_steps == 2),
    "max_steps": ({"max_steps": 1}, lambda trainer: trainer.state.global_step == 1),
    "learning_rate": ({"learning_rate": 0.5}, lambda trainer: rates(trainer)[0] == 0.5),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, lambda trainer: len(set(rates(trainer))) == 1),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 1.0}},
        lambda trainer: len(set(rates(trainer))) == 1,
    ),
    "warmup_steps": ({"warmup_steps": 2}, lambda trainer: rates(trainer)[0] == 0),
    "optim": ({"optim": "sgd"}, lambda trainer: isinstance(trainer.optimizer.optimizer, torch.optim.SGD)),
    "optim_args": (
        {"optim": "rmsprop", "optim_args": "alpha=0.5"},
        lambda trainer: isinstance(trainer.optimizer.optimizer, torch.optim.RMSprop),
    ),
    "weight_decay": ({"weight_decay": 0.1}, lambda trainer: group(trainer)["weight_decay"] == 0.1),
    "adam_beta1": ({"adam_beta1": 0.5}, lambda trainer: group(trainer)["betas"][0] == 0.5),
    "adam_beta2": ({"adam_beta2": 0.5}, lambda trainer: group(trainer)["betas"][1] == 0.5),
    "adam_epsilon": ({"adam_epsilon": 0.5}, lambda trainer: group(trainer)["eps"] == 0.5),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2},
        lambda trainer: len(trainer.sampler) % 12 == 0,
    ),
    "max_grad_norm": (
        {"max_grad_norm": 1e-9, "optim": "sgd", "learning_rate": 1.0},
        lambda trainer: moved(trainer) < 1e-6,
    ),
    "bf16": (
        {"bf16": True},
        lambda trainer: all(p.dtype == torch.float32 for p in trainer.model.tasks_by_parameter()),
    ),
    "activation_checkpointing": (
        {"activation_checkpointing": True},
        lambda trainer: trainer.model.clip.text_model.encoder.layers[0].gradient_checkpointing,
    ),
    "logging_strategy": ({"logging_strategy": "no"}, lambda trainer: not rates(trainer)),
    "logging_steps": ({"logging_steps": 2}, lambda trainer: len(rates(trainer)) == 1),
    "logging_first_step": (
        {"logging_steps": 2, "logging_first_step": True},
        lambda trainer: len(rates(trainer)) == 2,
    ),
    "eval_strategy": (
        {**EVALUATE, "eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
        lambda trainer: len(evaluations(trainer)) == 1,
    ),
    "eval_steps": (EVALUATE, lambda trainer: len(evaluations(trainer)) == 2),
    "eval_delay": ({**EVALUATE, "eval_delay": 2}, lambda trainer: len(evaluations(trainer)) == 1),
    "per_device_eval_batch_size": (
        {**EVALUATE, "per_device_eval_batch_size": 5},
        lambda trainer: "eval_mean_accuracy" in evaluations(trainer)[0],
    ),
    "prediction_loss_only": (
        {**EVALUATE, "prediction_loss_only": True},
        lambda trainer: "eval_mean_accuracy" not in evaluations(trainer)[0],
    ),
    "eval_on_start": ({**EVALUATE, "eval_on_start": True}, lambda trainer: len(evaluations(trainer)) == 3),
    "eval_do_concat_batches": (
        {**EVALUATE, "eval_do_concat_batches": False, "per_device_eval_batch_size": 5},
        lambda trainer: evaluations(trainer)[-1]["eval_mean_accuracy"] == accuracy_in_one_batch(trainer),
    ),
    "eval_use_gather_object": (
        {**EVALUATE, "eval_use_gather_object": True},
        lambda trainer: evaluations(trainer)[-1]["eval_mean_accuracy"] == accuracy_in_one_batch(trainer),
    ),
    "eval_accumulation_steps": (
        {**EVALUATE, "eval_accumulation_steps": 1, "per_device_eval_batch_size": 5},
        lambda trainer: evaluations(trainer)[-1]["eval_mean_accuracy"] == accuracy_in_one_batch(trainer),
    ),
    "include_for_metrics": (
        {**EVALUATE, "include_for_metrics": ["inputs", "loss"]},
        lambda trainer: evaluations(trainer)[-1]["eval_mean_accuracy"] == accuracy_in_one_batch(trainer),
    ),
    "save_only_model": ({**SAVE, "save_only_model": True}, lambda trainer: not saved(trainer, "optimizer.pt")),
    "save_strategy": (
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
        lambda trainer: saved(trainer, "tasks.json"),
    ),
    "save_steps": (SAVE, lambda trainer: len(saved(trainer, "tasks.json")) == 2),
    "save_total_limit": ({**SAVE, "save_total_limit": 1}, lambda trainer: len(saved(trainer, "tasks.json")) == 1),
    "load_best_model_at_end": (
        {**EVALUATE, **SAVE, "load_best_model_at_end": True},
        lambda trainer: trainer.state.best_model_checkpoint,
    ),
    "metric_for_best_model": (
        {**EVALUATE, **SAVE, "load_best_model_at_end": True, "metric_for_best_model": "worst_accuracy"},
        lambda trainer: trainer.state.best_metric == max(each["eval_worst_accuracy"] for each in evaluations(trainer)),
    ),
    "greater_is_better": (
        {
            **EVALUATE,
            **SAVE,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
            "load_best_model_at_end": True,
        },
        lambda trainer: trainer.state.best_metric == max(each["eval_loss"] for each in evaluations(trainer)),
    ),
    "seed": ({"seed": 7}, lambda trainer: trainer.sampler.seed == 7),
    "data_seed": ({"data_seed": 7}, lambda trainer: trainer.sampler.seed == 7),
    "use_cpu": ({"use_cpu": True}, lambda trainer: trainer.model.device.type == "cpu"),
    "skip_memory_metrics": (
        {"skip_memory_metrics": False},
        lambda trainer: "train_mem_cpu_alloc_delta" in trainer.state.log_history[-1],
    ),
}

# Arguments whose effect is not cheap to see, all of them in one run.
TOGETHER = {
    "average_tokens_across_devices": False,
    "torch_empty_cache_steps": 1,
    "auto_find_batch_size": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": False,
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": True,
    "report_to": "none",
    "run_name": "mine",
    "save_on_each_node": True,
    "enable_jit_checkpoint": True,
    "full_determinism": True,
    "accelerator_config": {"even_batches": True},
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "dataloader_pin_memory": False,
    "label_names": ["labels", "task_ids"],
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": False,
    "ddp_timeout": 60,
    "debug": "underflow_overflow",
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}

REFUSED = {
    "label_smoothing_factor": (0.1, "expected 0.0, since the tasks have different numbers of classes"),
    "neftune_noise_alpha": (5.0, "expected None, since it adds noise to the input of a language model"),
    "batch_eval_metrics": (True, "expected False, since the accuracies of the tasks are those of all images"),
    "remove_unused_columns": (True, "expected False, since images come from the tasks"),
    "length_column_name": ("size", "images have no length"),
    "train_sampling_strategy": ("group_by_length", "every batch holds every task; write `sampling`"),
    "include_num_input_tokens_seen": (True, "images are no tokens"),
    "use_cache": (True, "nothing is generated"),
    "use_liger_kernel": (True, "for language models"),
    "liger_kernel_config": ({"rope": True}, "for language models"),
    "optim_target_modules": ("all-linear", "what trains are the adapters"),
    "bf16_full_eval": (True, "would round the trained adapters for good; write bf16=True"),
    "fp16_full_eval": (True, "would round the trained adapters for good"),
    "parallelism_config": (object(), "use DDP or FSDP"),
}

# What is not run here, and where it is, or why it is not.
ELSEWHERE = {
    "gradient_checkpointing": "the deprecated name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the deprecated name of activation_checkpointing_kwargs",
    "torch_compile": "tests/tuner/test_compile.py",
    "torch_compile_backend": "tests/tuner/test_compile.py",
    "torch_compile_mode": "handed to torch.compile",
    "fp16": "needs a GPU",
    "tf32": "needs a GPU",
    "resume_from_checkpoint": "read by scripts; mmap_peft/commands/training.py hands it to train()",
    "ignore_data_skip": "test_resuming_takes_these_arguments",
    "restore_callback_states_from_checkpoint": "test_resuming_takes_these_arguments",
    "dataloader_num_workers": "test_trainer.py",
    "dataloader_prefetch_factor": "test_trainer.py",
    "dataloader_persistent_workers": "test_arguments.py",
    "dataloader_multiprocessing_context": "handed to torch's DataLoader",
    "ddp_static_graph": "several processes only",
    "ddp_backend": "several processes only",
    "fsdp": "tests/multitask/test_distributed.py, by accelerate's config",
    "fsdp_config": "tests/multitask/test_distributed.py, by accelerate's config",
    "deepspeed": "tests/multitask/test_distributed.py, by accelerate's config",
    "local_rank": "deprecated; the launcher sets it",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "read by scripts only"),
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_revision"),
        "tests/hub/test_push_and_pull.py",
    ),
    "hub_always_push": "a push is always waited for",
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "names for trackers"
    ),
}


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def group(trainer):
    return next(group for group in trainer.optimizer.param_groups if group["params"])


def saved(trainer, name):
    return list(Path(trainer.args.output_dir).glob(f"checkpoint-*/{name}"))


def moved(trainer):
    with torch.no_grad():
        return max((p - before).abs().max() for p, before in zip(trainer.model.tasks_by_parameter(), trainer.before))


def accuracy_in_one_batch(trainer):
    right = []
    for name, task in trainer.model.tasks.items():
        labels = trainer.model.predict([row["image"] for row in task.eval], name).labels
        truth = [task.class_names[row["label"]] for row in task.eval]
        right.append(sum(one == other for one, other in zip(labels, truth)) / len(truth))
    return pytest.approx(sum(right) / len(right))


@pytest.fixture
def make(clip_folder, processor, tasks, arguments):
    def trainer(callbacks=None, **fields):
        classifier = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, CONFIG)
        settings = {"sharing": "all", "max_steps": 2, "save_strategy": "no", **fields}
        made = MultiTaskTrainer(model=classifier, args=arguments(**settings), callbacks=callbacks)
        made.before = [parameter.detach().clone() for parameter in classifier.tasks_by_parameter()]
        return made

    yield trainer
    torch.use_deterministic_algorithms(False)


def test_no_argument_of_transformers_is_forgotten():
    tables = [name for table in (WORKS, TOGETHER, REFUSED, ELSEWHERE) for name in table]
    assert len(tables) == len(set(tables))
    assert NAMES - set(tables) == set()


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name, make):
    fields, effect = WORKS[name]
    if name not in NAMES:
        pytest.skip("this version of transformers lacks it")
    trainer = make(**fields)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert moved(trainer) > 0
    assert effect(trainer)


def test_they_work_together(make):
    needed = {**SAVE, **TOGETHER, "activation_checkpointing": True}
    trainer = make(**{name: value for name, value in needed.items() if name in NAMES})
    trainer.train()
    assert moved(trainer) > 0


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_sentence(name, arguments):
    value, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        arguments(**{name: value})


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo", "adalomo", "galore_adafactor_layerwise"])
def test_optimizers_of_whole_models_are_refused(optim, arguments):
    with pytest.raises(ValueError, match="for the linear layers of a whole model, not for adapters"):
        arguments(optim=optim)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name", ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
)
def test_sizes_below_one_are_refused(name, value, arguments):
    with pytest.raises(ValueError, match=f"Invalid value {value} for `{name}`: expected an integer of 1 or more"):
        arguments(**{name: value})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"grouping_steps": 2.5}, "Invalid value 2.5 for `grouping_steps`: expected an integer of 0 or more"),
        (
            {"affinity": "cosines"},
            "affinity='cosines' is no choice; write one of cosine, early, lookahead, directions",
        ),
        ({"unstable": "some"}, "unstable='some' is no choice; write one of all, none, keep"),
        ({"sharing": "global"}, r"sharing='global' is no choice; write one of groups, global\+groups, all, none"),
        ({"unstable": "none", "max_groups": 2}, "unstable='none' may make more groups than max_groups=2"),
        ({"grouping_threshold": "nan"}, "grouping_threshold='nan' is no threshold"),
        ({"grouping_threshold": float("inf")}, "Invalid value inf for `grouping_threshold`"),
        ({"image_cache_gb": float("nan")}, "Invalid value nan for `image_cache_gb`: expected a finite number"),
    ],
)
def test_numbers_that_would_fail_in_training_are_refused(fields, sentence, arguments):
    with pytest.raises(ValueError, match=sentence):
        arguments(**fields)


def test_labels_of_other_names_are_refused(arguments):
    with pytest.raises(ValueError, match=r"Invalid value \['start'\] for `label_names`"):
        arguments(label_names=["start"])


def test_batches_that_are_split_among_processes_are_refused(arguments):
    with pytest.raises(ValueError, match="each process's part of a batch must hold every task"):
        arguments(accelerator_config={"split_batches": True})


@pytest.mark.parametrize("name", ["ignore_data_skip", "restore_callback_states_from_checkpoint"])
def test_resuming_takes_these_arguments(name, make):
    fields = {**SAVE, **EVALUATE, "load_best_model_at_end": True}
    callbacks = [EarlyStoppingCallback(5)]
    make(callbacks, **fields).train()
    trainer = make(callbacks, max_steps=4, **fields, **{name: True})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    state = json.loads((Path(trainer.args.output_dir) / "checkpoint-4" / "trainer_state.json").read_text())
    assert "EarlyStoppingCallback" in state["stateful_callbacks"]
