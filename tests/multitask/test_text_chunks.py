"""Texts in chunks give what all texts at once give; how large the chunks are depends on nothing that changes."""

import contextlib

import pytest
import torch

from mmap_peft import (
    BitFitConfig,
    CoOpConfig,
    IVLPConfig,
    MmAPConfig,
    MultiTaskClassifier,
    Task,
    TaskGrouping,
    clip_lora_config,
    lora_config,
)
from mmap_peft.multitask import text_chunks
from mmap_peft.multitask.text_chunks import cgroup_limits, texts_at_once, total_memory


GROUPED = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
CLASSES = CoOpConfig(num_prompts=2, num_classes=4, init_ids=[], init_std=0.5)
NAMES = ["sun", "cloud", "star", "heart", "snowman", "a small umbrella"]


def make(clip, processor, config, text_chunk=None):
    """Three tasks with 4 classes each, whose texts differ; with prompts in groups, unless classes have their own."""
    tasks = [Task(f"task {number}", NAMES[number : number + 4]) for number in range(3)]
    classifier = MultiTaskClassifier(clip, processor, tasks, config, text_chunk=text_chunk)
    names = list(classifier.tasks)
    if classifier.uses_prompts:
        classifier.set_grouping(TaskGrouping(names, [[names[0], names[2]], [names[1]]]), keep_global=config is GROUPED)
    return classifier.train()


def step(classifier, autocast=False):
    """Loss and gradients of a step; each gradient arrives once, as DistributedDataParallel needs it."""
    torch.manual_seed(0)
    parameters, arrived = [p for p in classifier.parameters() if p.requires_grad], []
    batch = torch.randn(6, 3, 48, 48), torch.arange(6) % 3, torch.arange(6) % 4
    with contextlib.ExitStack() as stack:
        for number, parameter in enumerate(parameters):
            parameter.grad = None
            hook = parameter.register_post_accumulate_grad_hook(lambda _, number=number: arrived.append(number))
            stack.callback(hook.remove)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = classifier(*batch).loss
        loss.backward()
    assert len(arrived) == len(set(arrived)) > 0
    return loss.detach(), [p.grad for p in parameters if p.grad is not None]


CONFIGS = {
    "global, groups and tasks": GROUPED,
    "late prompts": MmAPConfig(num_prompts=4, source_shape=(2, 4), target_modules=r".*layers\.[12]", init_std=0.5),
    "words": IVLPConfig(num_prompts=2, init_std=0.5),
    "classes": CLASSES,
    "lora": lora_config(init_lora_weights=False),
    "bitfit": BitFitConfig(),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", CONFIGS)
def test_chunks_change_nothing_but_rounding(method, autocast, clip, processor):
    classifier, rows, passes = make(clip, processor, CONFIGS[method]), [], []
    expected = step(classifier, autocast)
    clip.text_projection.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    clip.text_model.encoder.layers[-1].mlp.register_forward_hook(lambda *_: passes.append(0))
    for size, chunks in ((12, [12]), (5, [4, 4, 4]), (3, [3, 3, 3, 3])):  # at the borders of tasks, and inside
        classifier.text_chunk = size
        rows.clear()
        passes.clear()
        found = step(classifier, autocast)
        assert rows == chunks and len(passes) == (1 if size == 12 else 2 * len(chunks))  # and again, going back
        again = step(classifier, autocast)
        for one, other, same in zip((found[0], *found[1]), (expected[0], *expected[1]), (again[0], *again[1])):
            assert torch.equal(one, same)
            assert torch.equal(one, other) or size < 12
            assert (one - other).norm() <= (0.2 if autocast else 1e-4) * other.norm() + 1e-7


def test_a_chunk_is_encoded_with_the_prompts_of_its_tasks_only(clip, processor, monkeypatch):
    classifier, routes = make(clip, processor, GROUPED, text_chunk=4), []
    prompts = classifier.adapter_set.prompts

    def recorded(tower, of_chunk, *args, **rows):
        if tower == "text":
            routes.append((list(of_chunk), rows["text"].tolist()))
        return prompts(tower, of_chunk, *args, **rows)

    monkeypatch.setattr(classifier.adapter_set, "prompts", recorded)
    step(classifier)
    assert routes == [([classifier.routes[name]], [0] * 4) for name in classifier.tasks]
    routes.clear()
    classifier.text_chunk = 6
    step(classifier)
    every = list(classifier.routes.values())
    assert routes == [(every[:2], [0] * 4 + [1] * 2), (every[1:], [0] * 2 + [1] * 4)]


def test_dropout_is_the_same_when_a_chunk_is_encoded_again(clip, processor):
    """A gradient through other random numbers would not be that of the loss."""
    classifier = make(clip, processor, clip_lora_config(init_lora_weights=False), text_chunk=4)
    parameter = next(p for name, p in classifier.named_parameters() if "text_model" in name and p.requires_grad)
    gradient = dict(zip([p for p in classifier.parameters() if p.requires_grad], step(classifier)[1]))[parameter]
    direction, losses = gradient / gradient.norm(), []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign * 1e-2)
        losses.append(step(classifier)[0])
        with torch.no_grad():
            parameter.add_(direction, alpha=-sign * 1e-2)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_the_number_depends_on_sizes_and_on_all_memory(clip, processor, monkeypatch):
    config, gib = clip.config.text_config, 2**30
    of_a_text = 10 * 3 * (16 * 32 + 4 * 64) * 4
    assert texts_at_once(config, 10, 4, 24 * gib) == 4 * gib // of_a_text
    for total in (16 * gib, 20 * gib, 32 * gib - 1):
        assert texts_at_once(config, 10, 4, total) == 4 * gib // of_a_text
    assert texts_at_once(config, 20, 2, 16 * gib) == texts_at_once(config, 10, 4, 16 * gib)
    assert texts_at_once(config, 10, 4, 4) == 1
    classifier, rows = make(clip, processor, GROUPED), []
    clip.text_projection.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    step(classifier)
    tokens = classifier.texts._batch[1].ids.shape[1]
    small = 4 * 8 * tokens * 3 * (16 * 32 + 4 * 64)  # bytes of memory in whose quarter two texts fit
    assert rows == [12]
    monkeypatch.setattr("mmap_peft.multitask.task_texts.total_memory", lambda device: 2 ** (small.bit_length()))
    rows.clear()
    found = step(classifier)
    assert rows[:1] != [12] and len(rows) > 2
    monkeypatch.undo()
    classifier.text_chunk = rows[0]
    for one, other in zip(step(classifier)[1], found[1]):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("lines", "files", "limits"),
    [
        (["0::/a/b"], {"a/b/memory.max": "max", "a/memory.max": "300", "memory.max": "500"}, [300, 500]),
        (["0::/elsewhere/a"], {"memory.max": "500"}, [500]),  # seen from inside a container
        (["0::/"], {}, []),
        (
            ["7:blkio:/a", "4:hugetlb,memory:/a", "0::/"],
            {"memory/a/memory.limit_in_bytes": "200", "blkio/a/memory.limit_in_bytes": "1"},
            [200],
        ),
        (None, {"memory.max": "500"}, []),
    ],
    ids=["nested", "container", "none", "version 1", "no proc"],
)
def test_limits_of_cgroups_are_found(lines, files, limits, tmp_path, monkeypatch):
    if lines is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(cgroup_limits(tmp_path)) == limits
    monkeypatch.setattr(text_chunks, "cgroup_limits", lambda: cgroup_limits(tmp_path))
    cpu = torch.device("cpu")
    machine = total_memory.__wrapped__(cpu)
    assert machine == min(limits, default=machine)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert total_memory.__wrapped__(cpu) == machine // 2
