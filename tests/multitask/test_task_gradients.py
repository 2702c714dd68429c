import contextlib

import pytest
import torch

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    Task,
    VPTConfig,
    lora_config,
)
from mmap_peft.multitask import task_gradients as module
from mmap_peft.multitask.images import IGNORE_INDEX
from mmap_peft.multitask.task_gradients import task_gradients


CONFIGS = {
    "mmap": MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1),
    "mmap, shallow": MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1, depth=1),
    "coop": CoOpConfig(num_prompts=2, init_std=0.1, position="middle"),
    "coop, class-specific": CoOpConfig(num_prompts=2, init_std=0.1, num_classes=3),
    "vpt": VPTConfig(num_prompts=3, init_std=0.1),
    "ivlp": IVLPConfig(num_prompts=2, num_vision_prompts=3, vision_depth=1, init_std=0.1),
    "maple": MaPLeConfig(num_prompts=2, init_std=0.1),
}
WORDS = ["sun", "cloud", "star", "heart", "snowman", "umbrella"]


def make(clip, processor, config, count=3, classes=None):
    """Tasks whose class lists differ in words and, unless `classes` is given, in length."""
    names = [[WORDS[(task + place) % 6] for place in range(classes or 2 + task % 4)] for task in range(count)]
    tasks = [Task(f"task {number}", found, train=[], eval=[]) for number, found in enumerate(names)]
    return MultiTaskClassifier(clip, processor, tasks, config)


def images(classifier, sizes, seed=0):
    """A shuffled batch with so many images of each task; every fifth counts for nothing.

    The others of a task are of one class: gradients of a random CLIP would all but cancel, and show rounding alone.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    numbers = numbers[torch.randperm(len(numbers), generator=generator)]
    classes = torch.tensor([len(task.class_names) for task in classifier.tasks.values()])[numbers]
    labels = numbers % classes
    labels[4::5] = IGNORE_INDEX
    return {
        "pixel_values": torch.randn(len(numbers), 3, 48, 48, generator=generator),
        "labels": labels,
        "task_ids": numbers,
    }


def a_backward_pass_a_task(classifier, batch):
    """The gradients of `task_gradients`: each task's images alone, and a whole backward pass for each."""
    parameters, found = list(classifier.adapter_parameters("global").values()), []
    with classifier.evaluating():
        for task in range(len(classifier.tasks)):
            rows = batch["task_ids"] == task
            logits = classifier(batch["pixel_values"][rows], batch["task_ids"][rows]).logits
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][rows], reduction="sum")
            parts = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def assert_same_gradients(found, expected):
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_a_backward_pass_a_task(clip, processor, config):
    classifier = make(clip, processor, config, classes=getattr(config, "num_classes", None))
    batch = images(classifier, [7, 2, 5])
    assert_same_gradients(task_gradients(classifier, "global", [batch])[0], a_backward_pass_a_task(classifier, batch))


@pytest.mark.parametrize("count", [1, 16])
def test_any_number_of_tasks(clip, processor, count):
    classifier = make(clip, processor, CONFIGS["mmap"], count)
    batch = images(classifier, [2 + task % 2 for task in range(count)])
    assert_same_gradients(task_gradients(classifier, "global", [batch])[0], a_backward_pass_a_task(classifier, batch))


def test_losses_and_gradients_of_some_tasks_are_those_of_all(clip, processor):
    classifier = make(clip, processor, CONFIGS["mmap"], 4)
    batch = images(classifier, [5, 2, 4, 3])
    gradients, losses = task_gradients(classifier, "global", [batch])
    with torch.no_grad(), classifier.evaluating():
        loss = classifier(**batch).loss * (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(losses.sum(), loss.double(), rtol=1e-5, atol=0)
    for names in ["task 1", "task 3"], ["task 2", "task 0"]:
        numbers = [list(classifier.tasks).index(name) for name in names]
        rows = sum(batch["task_ids"] == number for number in numbers).bool()
        some = task_gradients(classifier, "global", [{key: part[rows] for key, part in batch.items()}], names)
        assert_same_gradients(some[0], gradients[numbers])
        torch.testing.assert_close(some[1], losses[numbers], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_batches_of_any_tasks_give_the_same_gradients(clip, processor, monkeypatch, sharded):
    monkeypatch.setattr(module, "is_sharded", lambda model: sharded)
    classifier = make(clip, processor, CONFIGS["mmap"])
    batch = images(classifier, [7, 2, 5])
    small = [{name: tensor[start : start + 3] for name, tensor in batch.items()} for start in range(0, 14, 3)]
    nothing = {**small[0], "labels": torch.full_like(small[0]["labels"], IGNORE_INDEX)}
    found = task_gradients(classifier, "global", [*small, nothing])[0]
    assert_same_gradients(found, a_backward_pass_a_task(classifier, batch))


def test_a_task_without_images_has_no_gradient(clip, processor):
    classifier = make(clip, processor, CONFIGS["mmap"])
    norms = task_gradients(classifier, "global", [images(classifier, [3, 0, 3])])[0].norm(dim=1)
    assert norms[1] == 0 and norms[0] > 0 and norms[2] > 0


def count_tokens(clip):
    """Tokens of each pass through a tower's first layer."""
    tokens = {"text": [], "vision": []}
    for name, tower in (("text", clip.text_model), ("vision", clip.vision_model)):
        tower.encoder.layers[0].mlp.register_forward_hook(
            lambda module, args, output, name=name: tokens[name].append(output.shape[0] * output.shape[1])
        )
    return tokens


def test_one_pass_holds_all_tasks(clip, processor):
    classifier, tokens = make(clip, processor, CONFIGS["mmap"], 12), count_tokens(clip)
    batch = images(classifier, [2] * 12)
    classifier(**batch)
    step = {name: list(found) for name, found in tokens.items()}
    for found in tokens.values():
        found.clear()
    task_gradients(classifier, "global", [batch, batch, batch])[0]
    assert tokens == {"text": step["text"], "vision": step["vision"] * 3}


@pytest.mark.parametrize(("method", "chunk"), [("mmap", None), ("mmap", 2), ("ivlp", None)])
def test_tasks_of_the_same_texts_share_their_pass(clip, processor, method, chunk):
    names = [WORDS[:3], WORDS[3:], WORDS[:3], WORDS[2:], WORDS[:3], WORDS[3:]]
    tasks = [Task(f"task {number}", found, train=[], eval=[]) for number, found in enumerate(names)]
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIGS[method], text_chunk=chunk)
    batch = images(classifier, [3, 2, 4, 2, 3, 2])
    expected, tokens = a_backward_pass_a_task(classifier, batch), count_tokens(clip)
    assert_same_gradients(task_gradients(classifier, "global", [batch])[0], expected)
    if method == "mmap" and chunk is None:
        classifier(**batch)
        snapshot, step = tokens["text"]
        assert snapshot == step


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["mmap", "vpt"])
def test_nothing_is_left_behind(clip, processor, name, fails):
    classifier = make(clip, processor, CONFIGS[name])
    for layer in clip.text_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    classifier.train()
    clip.vision_model.eval()
    batch = images(classifier, [4, 4, 4])
    with torch.no_grad(), classifier.evaluating():
        before = classifier(**batch).logits
    container = clip.mmap

    def state():
        return {
            "modules": [(name, module.training) for name, module in classifier.named_modules()],
            "parameters": [(name, parameter.requires_grad) for name, parameter in classifier.named_parameters()],
            "tensors": list(classifier.state_dict()),
            "adapters": (list(classifier.model.peft_config), container.active_adapters, dict(container.layers)),
            "routes": dict(classifier.routes),
            "texts": set(classifier._text_cache._kept[1]),
            "random": torch.get_rng_state().tolist(),
        }

    def batches():
        yield batch
        if fails:
            raise OSError("no such file")

    then = state()
    with pytest.raises(OSError, match="no such file") if fails else contextlib.nullcontext():
        task_gradients(classifier, "global", batches())
    assert state() == then
    assert all(parameter.grad is None for parameter in classifier.parameters())
    with torch.no_grad(), classifier.evaluating():
        assert torch.equal(classifier(**batch).logits, before)


def test_adapters_beside_the_shared_one_stay_in_use(clip, processor):
    classifier = make(clip, processor, CONFIGS["mmap"])
    classifier.replace_adapters(["global", "own"])
    classifier.routes["task 1"] = ("global", "own")
    classifier.routes["task 2"] = ("own",)
    batch = images(classifier, [4, 4, 4])
    found = task_gradients(classifier, "global", [batch])[0]
    one = {name: tensor[batch["task_ids"] < 2] for name, tensor in batch.items()}
    assert found[2].norm() == 0
    del classifier.tasks["task 2"], classifier.routes["task 2"]
    assert_same_gradients(found[:2], a_backward_pass_a_task(classifier, one))


def test_methods_without_prompts_take_no_snapshot(clip, processor, arguments, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, lora_config())
    with pytest.raises(ValueError, match="has no prompts to join"):
        MultiTaskTrainer(model=classifier, args=arguments()).group_tasks()
