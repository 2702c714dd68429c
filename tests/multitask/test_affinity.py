import contextlib

import numpy as np
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
from mmap_peft.multitask import affinity
from mmap_peft.multitask.affinity import cosine_similarity, task_gradients
from mmap_peft.multitask.images import IGNORE_INDEX


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
    """What `task_gradients` equals: each task's images alone, and a whole backward pass for each."""
    parameters, found = list(classifier.adapter_parameters("global").values()), []
    with classifier.evaluating():
        for task in range(len(classifier.tasks)):
            rows = batch["task_ids"] == task
            logits = classifier(batch["pixel_values"][rows], batch["task_ids"][rows]).logits
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][rows], reduction="sum")
            parts = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def assert_same_directions(found, expected):
    names = [str(number) for number in range(len(found))]
    np.testing.assert_allclose(cosine_similarity(found, names), cosine_similarity(expected, names), atol=1e-5)
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_a_backward_pass_a_task(clip, processor, config):
    classifier = make(clip, processor, config, classes=getattr(config, "num_classes", None))
    batch = images(classifier, [7, 2, 5])
    assert_same_directions(task_gradients(classifier, "global", [batch]), a_backward_pass_a_task(classifier, batch))


@pytest.mark.parametrize("count", [1, 16])
def test_any_number_of_tasks(clip, processor, count):
    classifier = make(clip, processor, CONFIGS["mmap"], count)
    batch = images(classifier, [2 + task % 2 for task in range(count)])
    assert_same_directions(task_gradients(classifier, "global", [batch]), a_backward_pass_a_task(classifier, batch))


@pytest.mark.parametrize("sharded", [False, True])
def test_batches_of_any_tasks_give_the_same_gradients(clip, processor, monkeypatch, sharded):
    monkeypatch.setattr(affinity, "is_sharded", lambda model: sharded)
    classifier = make(clip, processor, CONFIGS["mmap"])
    batch = images(classifier, [7, 2, 5])
    small = [{name: tensor[start : start + 3] for name, tensor in batch.items()} for start in range(0, 14, 3)]
    nothing = {**small[0], "labels": torch.full_like(small[0]["labels"], IGNORE_INDEX)}
    found = task_gradients(classifier, "global", [*small, nothing])
    assert_same_directions(found, a_backward_pass_a_task(classifier, batch))


def test_a_task_without_images_has_no_gradient(clip, processor):
    classifier = make(clip, processor, CONFIGS["mmap"])
    norms = task_gradients(classifier, "global", [images(classifier, [3, 0, 3])]).norm(dim=1)
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
    task_gradients(classifier, "global", [batch, batch, batch])
    assert tokens == {"text": step["text"], "vision": step["vision"] * 3}


@pytest.mark.parametrize(("method", "chunk"), [("mmap", None), ("mmap", 2), ("ivlp", None)])
def test_tasks_of_the_same_texts_share_their_pass(clip, processor, method, chunk):
    names = [WORDS[:3], WORDS[3:], WORDS[:3], WORDS[2:], WORDS[:3], WORDS[3:]]
    tasks = [Task(f"task {number}", found, train=[], eval=[]) for number, found in enumerate(names)]
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIGS[method], text_chunk=chunk)
    batch = images(classifier, [3, 2, 4, 2, 3, 2])
    expected, tokens = a_backward_pass_a_task(classifier, batch), count_tokens(clip)
    assert_same_directions(task_gradients(classifier, "global", [batch]), expected)
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
    found = task_gradients(classifier, "global", [batch])
    one = {name: tensor[batch["task_ids"] < 2] for name, tensor in batch.items()}
    assert found[2].norm() == 0
    del classifier.tasks["task 2"], classifier.routes["task 2"]
    assert_same_directions(found[:2], a_backward_pass_a_task(classifier, one))


def test_methods_without_prompts_take_no_snapshot(clip, processor, arguments, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, lora_config())
    with pytest.raises(ValueError, match="has no prompts to join"):
        MultiTaskTrainer(model=classifier, args=arguments()).group_tasks()


def test_similarity_is_that_of_directions():
    gradients = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = list("wxyz")
    found = cosine_similarity(gradients, names)
    assert np.array_equal(found, found.T)
    assert np.array_equal(np.diag(found), np.ones(4))
    # scaling a task's loss scales its gradient: nothing changes
    scaled = gradients * torch.tensor([1e-3, 1.0, 7.0, 1e4], dtype=torch.float64)[:, None]
    np.testing.assert_allclose(cosine_similarity(scaled, names), found, atol=1e-12)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(cosine_similarity(gradients[order], names), found[np.ix_(order, order)], atol=1e-12)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_task_without_a_direction_stops_with_its_name(value):
    gradients = torch.ones(2, 3, dtype=torch.float64)
    gradients[1] = value
    with pytest.raises(ValueError, match="gradient of task 'y' has the norm"):
        cosine_similarity(gradients, ["x", "y"])
