import copy

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mmap_peft import CoOpConfig, MmAPConfig, MultiTaskClassifier, Task, TaskGrouping, lora_config, use_routes
from mmap_peft.data.pictograms import draw
from mmap_peft.multitask.images import TaskImages, collate

from ..conftest import load_clip, make_task


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks, CONFIG)


@pytest.fixture
def grouped(classifier):
    classifier.set_grouping(TaskGrouping(["print", "clipart", "photo"], [["print", "photo"], ["clipart"]]))
    return classifier


@pytest.fixture
def batch(classifier):
    """Images of all three tasks, mixed."""
    images = TaskImages(classifier.tasks.values(), "train", classifier.processor.image_processor)
    return collate([images[row] for row in (7, 0, 23, 14, 3, 16)])


def alone(classifier, task, pixels):
    """Logits of one task by CLIP's own forward, with the task's route for everything."""
    texts = [texts[0] for texts in classifier.tasks[task].texts]
    ids = classifier.processor.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    with use_routes(classifier.model, classifier.routes[task]):
        return classifier.model(input_ids=ids, pixel_values=pixels).logits_per_image


def test_mixed_tasks_equal_a_forward_a_task(grouped, batch):
    output = grouped(**batch)
    assert output.logits.shape == (6, 5)
    losses = []
    for row, number in enumerate(batch["task_ids"].tolist()):
        task = list(grouped.tasks)[number]
        expected = alone(grouped, task, batch["pixel_values"][row : row + 1])
        classes = expected.shape[1]
        torch.testing.assert_close(output.logits[row, :classes], expected[0], atol=1e-4, rtol=1e-5)
        assert (output.logits[row, classes:] == float("-inf")).all()
        losses.append(F.cross_entropy(expected, batch["labels"][row : row + 1]))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_group_prompts_collect_all_their_tasks_gradients_and_task_prompts_their_own(grouped, batch):
    """The gradient of the whole equals the sum over tasks; each task reaches its route and nothing else."""

    def gradients(rows):
        grouped.zero_grad(set_to_none=True)
        part = {name: tensor[rows] for name, tensor in batch.items()}
        (grouped(**part).loss * len(rows)).backward()
        names = grouped.adapters
        return {name: {k: p.grad for k, p in grouped.adapter_parameters(name).items()} for name in names}

    whole = gradients(list(range(6)))
    parts = []
    for number, task in enumerate(grouped.tasks):
        parts.append(gradients([row for row in range(6) if batch["task_ids"][row] == number]))
        reached = {name for name, found in parts[-1].items() if any(g is not None and g.any() for g in found.values())}
        assert reached == set(grouped.routes[task])
    assert grouped.routes == {
        "print": ("group_0", "print"),
        "clipart": ("group_1", "clipart"),
        "photo": ("group_0", "photo"),
    }
    for adapter, found in whole.items():
        for name, gradient in found.items():
            summed = sum(part[adapter][name] for part in parts if part[adapter][name] is not None)
            assert (gradient - summed).norm() <= 1e-4 * gradient.norm()


def test_unreadable_images_do_not_count(classifier, batch):
    expected = classifier(**{name: tensor[:4] for name, tensor in batch.items()}).loss
    batch["labels"][4:] = -100
    torch.testing.assert_close(classifier(**batch).loss, expected)
    batch["labels"][:] = -100
    assert classifier(**batch).loss == 0


def test_free_texts_and_several_templates(clip, processor):
    task = make_task(
        "print", 3, template=["a photo of a {}.", "{}"], class_texts={"umbrella": "a very small ship on a wall"}
    )
    classifier = MultiTaskClassifier(clip, processor, [task], CONFIG).eval()

    def feature(text):
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        return F.normalize(classifier.model.get_text_features(ids).pooler_output, dim=-1)[0]

    assert task.texts[2] == ("a very small ship on a wall",)
    found = classifier.encode_texts(["print"])[0]
    for row, texts in enumerate(task.texts):
        expected = F.normalize(torch.stack([feature(text) for text in texts]).mean(0), dim=-1)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_equal_texts_of_one_route_run_once_and_other_routes_apart(clip, processor):
    names = ["sun", "cloud", "star"]
    classifier = MultiTaskClassifier(
        clip,
        processor,
        [Task(name, names) for name in ("red", "green", "blue")] + [Task("plain", names, template="{}")],
        CONFIG,
    )
    rows = []
    classifier.clip.text_projection.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    batch = {
        "pixel_values": torch.randn(4, 3, 48, 48),
        "task_ids": torch.arange(4),
        "labels": torch.tensor([0, 1, 2, 0]),
    }

    def run():
        rows.clear()
        loss = classifier(**batch).loss
        return loss, torch.autograd.grad(loss, list(classifier.adapter_parameters("global").values())), sum(rows)

    loss, gradients, most = run()
    assert most == 6  # three texts for red, green and blue, and three others for plain
    texts_of, kept = classifier.texts.of, {}
    classifier.texts.of = lambda task, route: kept.setdefault(task.name, copy.deepcopy(texts_of(task, route)))
    apart, expected, most = run()
    assert most == 12
    torch.testing.assert_close(loss, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
    classifier.texts.of = texts_of
    classifier.set_grouping(TaskGrouping(list(classifier.tasks), [["red", "green"], ["blue", "plain"]]))
    classifier(**batch)
    assert rows[-1] == 12


def test_text_features_are_kept_at_evaluation_and_dropped_when_prompts_change(grouped, batch):
    calls = []
    encode = grouped._encode
    grouped._encode = lambda tasks, *others: calls.append(list(tasks)) or encode(tasks, *others)
    grouped.eval()
    with torch.no_grad():
        first = grouped(**batch).logits
        assert torch.equal(grouped(**batch).logits, first)
        assert len(calls) == 1
        grouped.adapter_parameters("print")["source"].mul_(1.5)
        changed = grouped(**batch).logits
        assert len(calls) == 2
        rows = batch["task_ids"] == 0
        assert not torch.equal(changed[rows], first[rows])
        with grouped.zero_shot():
            assert not torch.equal(grouped(**batch).logits, changed)
        assert torch.equal(grouped(**batch).logits, changed)
        assert len(calls) == 3
    grouped(**batch)  # with gradients: always anew
    assert len(calls) == 4


def test_training_after_evaluation_uses_no_kept_features(grouped, batch):
    grouped.eval()
    with torch.no_grad():
        grouped(**batch)
    optimizer = torch.optim.SGD([p for p in grouped.parameters() if p.requires_grad], lr=1.0)
    grouped.train()
    grouped(**batch).loss.backward()
    optimizer.step()
    grouped.eval()
    with torch.no_grad():
        kept = grouped(**batch).logits
    torch.testing.assert_close(kept, grouped(**batch).logits)


def test_predicting(grouped):
    images = [draw("print", "sun", 0), draw("print", "star", 1).convert("L")]
    grouped.train()
    found = grouped.predict(images, task="clipart")
    assert grouped.training
    assert found.probabilities.shape == (2, 5)
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(2))
    names = grouped.tasks["clipart"].class_names
    assert found.labels == [names[number] for number in found.probabilities.argmax(-1)]
    one = grouped.predict(images[0], task="clipart")
    torch.testing.assert_close(one.probabilities[0], found.probabilities[0])
    mixed = grouped.predict(images, task=["print", "clipart"])
    torch.testing.assert_close(mixed.probabilities[1], found.probabilities[1])
    torch.testing.assert_close(mixed.probabilities[0, :3], grouped.predict(images[0], task="print").probabilities[0])
    assert mixed.labels[1] == found.labels[1] and (mixed.probabilities[0, 3:] == 0).all()
    with pytest.raises(ValueError, match="'sketch' is none of the tasks; write one of print, clipart, photo"):
        grouped.predict(images, task="sketch")
    with pytest.raises(ValueError, match="1 tasks were given for 2 images"):
        grouped.predict(images, task=["print"])


def test_without_a_config_it_is_zero_shot(clip_folder, processor, tasks, batch):
    plain = MultiTaskClassifier(load_clip(clip_folder), processor, tasks)
    assert plain.adapters == []
    prompted = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, CONFIG)
    with prompted.zero_shot():
        torch.testing.assert_close(prompted(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(prompted(**batch).logits, plain(**batch).logits)


def test_groups_start_from_the_global_prompts(classifier):
    before = {name: parameter.clone() for name, parameter in classifier.adapter_parameters("global").items()}
    classifier.set_grouping(TaskGrouping(list(classifier.tasks), [["print"], ["clipart", "photo"]]))
    assert classifier.adapters == ["group_0", "group_1", "print", "clipart", "photo"]
    for group in ("group_0", "group_1"):
        for name, parameter in classifier.adapter_parameters(group).items():
            assert torch.equal(parameter, before[name])
    assert all(p.requires_grad for name in classifier.adapters for p in classifier.adapter_parameters(name).values())
    with pytest.raises(ValueError, match="make one of the same tasks"):
        classifier.set_grouping(TaskGrouping(["print"], [["print"]]))


def test_the_same_seed_gives_the_same_prompts(clip, processor, tasks):
    def make(seed, drawn):
        torch.rand(drawn)  # whatever was drawn before
        made = MultiTaskClassifier(copy.deepcopy(clip), processor, tasks, CONFIG, seed=seed)
        return made.adapter_parameters("global")["source"]

    assert torch.equal(make(1, 3), make(1, 5))
    assert not torch.equal(make(1, 3), make(2, 3))


def test_a_new_task_trains_alone_in_an_existing_group(grouped, batch):
    grouped.eval()
    before = grouped(**batch).logits
    grouped.add_task(make_task("sketch", 4), group="photo")
    assert grouped.routes["sketch"] == ("group_0", "sketch")
    assert grouped.grouping.groups == [["print", "photo", "sketch"], ["clipart"]]
    assert torch.equal(grouped(**batch).logits, before)
    trained = {name.split(".mmap_generators.")[1] for name, p in grouped.named_parameters() if p.requires_grad}
    assert trained == {"<sketch>.source", "<sketch>.scale_text", "<sketch>.scale_vision"}
    output = grouped(batch["pixel_values"], torch.full((6,), 3), torch.zeros(6, dtype=torch.long))
    assert output.logits.shape == (6, 5)
    output.loss.backward()
    grouped.add_task(make_task("sketch", 4, name="lonely"))
    assert grouped.routes["lonely"] == ("lonely",)
    with pytest.raises(ValueError, match="'nowhere' is no group or task"):
        grouped.add_task(make_task("sketch", 4, name="third"), group="nowhere")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "was given no task"),
        (["Real World", "real_world"], "would both have the adapter 'real_world'"),
        (["global"], "kept for prompts of several tasks"),
        (["group_1"], "kept for prompts of several tasks"),
    ],
)
def test_tasks_whose_names_collide_stop_with_a_sentence(names, sentence, clip, processor):
    with pytest.raises(ValueError, match=sentence):
        MultiTaskClassifier(clip, processor, [Task(name, ["x", "y"]) for name in names], CONFIG)


def test_a_text_beyond_the_positions_stops_with_its_task(clip, processor):
    task = Task("art", ["bed", "a lamp " * 20])
    with pytest.raises(ValueError, match=r"of task 'art' has \d+ tokens .* has 20 positions"):
        MultiTaskClassifier(clip, processor, [task], CONFIG)


def test_images_are_read_as_rgb(grouped):
    assert grouped.predict(Image.new("RGBA", (60, 60)), task="print").probabilities.shape == (1, 3)


@pytest.mark.parametrize("config", [CONFIG, CoOpConfig(num_prompts=4), lora_config()], ids=["mmap", "coop", "lora"])
def test_chunks_of_texts_change_nothing(config, clip_folder, processor, tasks):
    found, rows = [], []

    def count(module, args, output):
        rows.append(len(output))

    for size in (None, 4, 100):
        clip = load_clip(clip_folder)
        classifier = MultiTaskClassifier(clip, processor, tasks, config, text_chunk=size)
        images = TaskImages(tasks, "train", processor.image_processor)
        clip.text_model.embeddings.register_forward_hook(count)
        loss = classifier.eval()(**collate([images[row] for row in (7, 0, 23)])).loss
        gradients = torch.autograd.grad(loss, list(classifier.adapter_parameters("global").values()))
        assert max(rows) == min(size or 12, 12)
        with torch.no_grad():
            features = torch.cat([classifier.class_weights(name)[0] for name in classifier.tasks])
        found.append((loss, gradients, features))
        rows.clear()
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="Invalid value 0 for `text_chunk`: expected an integer of 1 or more"):
        MultiTaskClassifier(clip, processor, tasks, config, text_chunk=0)
