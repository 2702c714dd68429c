"""The losses of PromptSRC equal their formulas, computed by hand from features of the plain CLIP."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MmAPConfig,
    MMRLTokensConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    PromptSRCConfig,
    Task,
    TaskGrouping,
    VPTConfig,
    lora_config,
)
from mmap_peft.multitask.consistency import Consistency, divergence
from mmap_peft.multitask.images import IGNORE_INDEX
from mmap_peft.multitask.templates import TEMPLATES

from ..conftest import load_clip


CONFIGS = {
    "mmap": MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.3),
    "ivlp": IVLPConfig(num_prompts=2, num_vision_prompts=3, init_std=0.3),
    "vpt": VPTConfig(num_prompts=2, init_std=0.3),
}
NUMBERS, LABELS = [2, 0, 1, 2, 0, 1], [3, 0, 4, 1, 2, 0]


@pytest.fixture
def make(clip_folder, processor, tasks):
    """Makes a classifier of a fresh CLIP, with a group of two tasks."""

    def classifier(config="mmap", groups=True, own_tasks=None):
        clip = load_clip(clip_folder)
        classifier = MultiTaskClassifier(clip, processor, own_tasks or tasks, CONFIGS.get(config, config))
        if groups:
            classifier.set_grouping(
                TaskGrouping.by_mode("given", list(classifier.tasks), [["print", "photo"], ["clipart"]])
            )
        return classifier

    return classifier


def batch(count=6):
    pixels = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return pixels[:count], torch.tensor(NUMBERS[:count]), torch.tensor(LABELS[:count])


def consistency(classifier, text=0.0, image=0.0, logits=0.0, templates=TEMPLATES):
    return Consistency(text, image, logits, classifier.frozen_text_features(list(classifier.tasks), templates))


def parameters(classifier):
    return [p for adapter in classifier.adapters for p in classifier.adapter_parameters(adapter).values()]


def loss_and_gradients(classifier, weights, data=None):
    """The consistency loss alone, and its gradients."""
    output = classifier(*(data or batch()), consistency=consistency(classifier, **weights))
    loss = output.consistency.sum()
    return output, loss, torch.autograd.grad(loss + 0 * output.loss, parameters(classifier), materialize_grads=True)


def by_hand(classifier, clip, text=0.0, image=0.0, logits=0.0):
    """The same with a loop over images, from the formulas and the plain CLIP."""
    total, (pixels, numbers, _) = 0.0, batch()
    for row, number in enumerate(numbers.tolist()):
        task = list(classifier.tasks.values())[number]
        with torch.no_grad():
            means = []
            for name in task.class_names:
                texts = [template.replace("{}", name) for template in TEMPLATES]
                ids = classifier.processor.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
                mean = clip.get_text_features(ids).pooler_output.mean(0)
                means.append(mean / mean.norm())
            g_bar = torch.stack(means)
            f_bar = F.normalize(clip.get_image_features(pixels[row : row + 1]).pooler_output[0], dim=0)
            frozen = clip.logit_scale.exp() * g_bar @ f_bar
        g, _ = classifier.class_weights(task.name)
        route = classifier.routes[task.name]
        f = classifier.image_features(pixels[row : row + 1], [route], torch.tensor([0]))[0]
        own = clip.logit_scale.exp() * g @ f
        classes, size = g.shape
        p_bar, p = frozen.softmax(0), own.softmax(0)
        total = total + text * (g - g_bar).abs().sum() / (classes * size) + image * (f - f_bar).abs().sum() / size
        total = total + logits * (p_bar * (p_bar / p).log()).sum() / classes
    return total / len(numbers)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "weights",
    [{"text": 25.0}, {"image": 10.0}, {"logits": 100.0}, {"text": 2.0, "image": 3.0, "logits": 5.0}],
    ids=str,
)
def test_each_loss_and_its_gradient_equal_the_formula(weights, config, make, clip):
    classifier = make(config)
    _, found, gradients = loss_and_gradients(classifier, weights)
    expected = by_hand(classifier, clip, **weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found > 1e-3
    by_formula = torch.autograd.grad(expected, parameters(classifier), materialize_grads=True)
    learns = config != "vpt" or {"image", "logits"} & weights.keys()  # VPT has no prompts in the text tower
    assert any(gradient.abs().max() > 1e-4 for gradient in by_formula) == bool(learns)
    for one, other in zip(gradients, by_formula):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_with_one_task_it_equals_the_authors_reductions(make, clip, tasks):
    """Of the code of PromptSRC: means over all elements, and the divergence's sum over the number of logits."""
    classifier = make("ivlp", groups=False, own_tasks=tasks[:1])
    pixels, labels = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1])
    parts = consistency(classifier, 25.0, 10.0, 1.0)
    with torch.no_grad():
        output = classifier(pixels, torch.zeros(4, dtype=torch.long), labels, consistency=parts)
        texts, frozen_texts = classifier.class_weights("print")[0], parts.frozen_texts["print"]
        images = classifier.image_features(pixels, [("global",)], torch.zeros(4, dtype=torch.long))
        frozen_images = F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1)
        scale = clip.logit_scale.exp()
        logits, frozen = scale * images @ texts.T, scale * frozen_images @ frozen_texts.T
        divergences = F.kl_div(logits.log_softmax(1), frozen.log_softmax(1), reduction="sum", log_target=True)
        expected = (
            F.cross_entropy(logits, labels)
            + 25 * F.l1_loss(texts, frozen_texts)
            + 10 * F.l1_loss(images, frozen_images)
            + divergences / logits.numel()
        )
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)


def test_with_cosines_it_is_the_regularization_of_mmrl(make, clip, tasks):
    """Of the code of MMRL: one minus the mean cosine, of the images and of the texts of the task's own template."""
    classifier = make("ivlp", groups=False, own_tasks=tasks[:1])
    pixels, numbers = batch(4)[0], torch.zeros(4, dtype=torch.long)
    frozen = classifier.frozen_text_features(["print"])
    parts = Consistency(2.0, 3.0, 0.0, frozen, "cosine")
    with torch.no_grad():
        found = classifier(pixels, numbers, numbers, consistency=parts).consistency
        texts = classifier.class_weights("print")[0]
        images = classifier.image_features(pixels, [("global",)], numbers)
        frozen_images = clip.get_image_features(pixels).pooler_output
        expected = 2 * (1 - F.cosine_similarity(texts, frozen["print"]).mean())
        expected = expected + 3 * (1 - F.cosine_similarity(images, frozen_images).mean())
    torch.testing.assert_close(found, expected[None], atol=1e-5, rtol=1e-5)


def test_the_divergence_is_zero_for_equal_logits_and_positive_for_others():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits[:2, 3] = float("-inf")  # tasks with fewer classes
    own = logits.clone().requires_grad_()
    found = divergence(own, logits)
    assert torch.equal(found, torch.zeros(5))
    (gradient,) = torch.autograd.grad(found.sum(), own)
    torch.testing.assert_close(gradient, torch.zeros(5, 4), atol=1e-6, rtol=0)
    assert (divergence(logits + torch.arange(4.0), logits) > 0).all()


def test_the_loss_is_the_cross_entropy_and_the_parts_of_the_tasks(make):
    classifier = make()
    plain, output = classifier(*batch()), loss_and_gradients(classifier, {"text": 25.0, "image": 10.0})[0]
    assert torch.equal(output.logits, plain.logits)
    torch.testing.assert_close(output.loss, plain.loss + output.consistency.sum())
    assert output.consistency.shape == (3,) and (output.consistency > 0).all()


def test_the_part_of_a_task_does_not_depend_on_other_tasks_images(make):
    classifier = make()
    weights = {"text": 2.0, "image": 3.0, "logits": 5.0}
    pixels, numbers, labels = batch()
    mixed = loss_and_gradients(classifier, weights)[0].consistency * len(labels)
    changed = torch.where((numbers == 1)[:, None, None, None], pixels, pixels.flip(-1) + 1)
    other = loss_and_gradients(classifier, weights, (changed, numbers, labels))[0].consistency * len(labels)
    alone = [each[numbers == 1] for each in (pixels, numbers, labels)]
    found = loss_and_gradients(classifier, weights, alone)[0].consistency * len(alone[0])
    torch.testing.assert_close(found[1], mixed[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other[1], mixed[1], atol=1e-5, rtol=1e-4)
    assert (other - mixed)[0].abs() > 1e-3 and found[0] == found[2] == 0


def test_images_that_could_not_be_read_do_not_count(make):
    classifier = make()
    weights = {"text": 2.0, "image": 3.0, "logits": 5.0}
    pixels, numbers, labels = batch()
    expected = loss_and_gradients(classifier, weights, batch(4))[1]
    labels[4:] = IGNORE_INDEX
    torch.testing.assert_close(loss_and_gradients(classifier, weights, (pixels, numbers, labels))[1], expected)
    labels[:] = IGNORE_INDEX
    assert loss_and_gradients(classifier, weights, (pixels, numbers, labels))[1] == 0


def test_images_pass_through_the_frozen_clip_only_if_a_loss_needs_it(make, monkeypatch):
    classifier, sizes = make(), []
    plain = classifier.clip.get_image_features
    record = lambda pixels, **keywords: sizes.append(torch.is_grad_enabled()) or plain(pixels, **keywords)  # noqa: E731
    monkeypatch.setattr(classifier.clip, "get_image_features", record)
    for weights, passes in ({"text": 1.0}, [True]), ({"image": 1.0}, [True, False]), ({"logits": 1.0}, [True, False]):
        sizes.clear()
        classifier(*batch(), consistency=consistency(classifier, **weights))
        assert sizes == passes


def test_frozen_texts_are_encoded_once_and_again_if_the_base_changes(make, monkeypatch):
    classifier, counts = make(), []
    names, plain = list(classifier.tasks), classifier.clip.get_text_features
    monkeypatch.setattr(
        classifier.clip, "get_text_features", lambda ids, **more: counts.append(len(ids)) or plain(ids, **more)
    )
    first = classifier.frozen_text_features(names, TEMPLATES)
    assert sum(counts) == 60 * 12
    with torch.no_grad():
        parameters(classifier)[0].add_(1)
    again = classifier.frozen_text_features(names, TEMPLATES)
    assert sum(counts) == 60 * 12 and all(torch.equal(first[name], again[name]) for name in names)
    with torch.no_grad():
        classifier.clip.text_projection.weight.mul_(-1)
    changed = classifier.frozen_text_features(names, TEMPLATES)
    torch.testing.assert_close(changed["print"], -first["print"], atol=1e-5, rtol=0)


def test_the_tasks_own_texts_can_be_compared_with(make, clip, processor):
    own = Task("own", ["sun", "cloud"], template="a {}.", class_texts={"sun": ["the sun", "sunny"]})
    classifier = make(groups=False, own_tasks=[own])
    texts = [["the sun", "sunny"], ["a cloud."]]
    with torch.no_grad():
        ids = [processor.tokenizer(each, return_tensors="pt", padding=True)["input_ids"] for each in texts]
        expected = torch.stack([clip.get_text_features(each).pooler_output.mean(0) for each in ids])
    found = classifier.frozen_text_features(["own"])["own"]
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
    ensemble = classifier.frozen_text_features(["own"], TEMPLATES)["own"]
    torch.testing.assert_close(ensemble[0], found[0], atol=1e-6, rtol=0)  # texts of single classes stay
    assert (ensemble[1] - found[1]).abs().max() > 1e-3


# ---- settings


def test_a_method_brings_its_own_values_and_arguments_replace_them():
    promptsrc, mmap = PromptSRCConfig(), MmAPConfig()
    rest = "ensemble", "absolute"
    assert MultiTaskTrainingArguments().regularization(promptsrc) == (25.0, 10.0, 1.0, *rest, 0.75)
    assert MultiTaskTrainingArguments().regularization(mmap) == (0.0, 0.0, 0.0, *rest, 0.0)
    args = MultiTaskTrainingArguments(text_consistency=0, image_consistency=5, average_mean=0.5)
    assert args.regularization(promptsrc) == (0.0, 5.0, 1.0, *rest, 0.5)
    assert args.regularization(mmap) == args.regularization(lora_config()) == (0.0, 5.0, 0.0, *rest, 0.5)
    assert args.regularization(MMRLTokensConfig()) == (0.0, 5.0, 0.0, "task", "cosine", 0.5)
    args = MultiTaskTrainingArguments(feature_distance="absolute", frozen_texts="ensemble")
    assert args.regularization(MMRLTokensConfig()) == (1.0, 1.0, 0.0, *rest, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (f"{each}_consistency", value)
            for each in ("text", "image", "logit")
            for value in (-1.0, float("nan"), "1")
        ),
        *(("average_mean", value) for value in (-0.1, 1.1, "half")),
        *(("average_std", value) for value in (0.0, -1.0, None)),
        ("frozen_texts", "templates"),
        ("feature_distance", "l1"),
    ],
)
def test_settings_that_cannot_be_stop_with_a_sentence(name, value):
    with pytest.raises(ValueError, match=name):
        MultiTaskTrainingArguments(**{name: value})


def test_methods_without_prompts_have_no_consistency(clip, processor, tasks, arguments):
    classifier = MultiTaskClassifier(clip, processor, tasks, lora_config(r=2))
    with pytest.raises(ValueError, match="LoraConfig has no prompts; leave them out"):
        MultiTaskTrainer(classifier, arguments(image_consistency=1.0))


@pytest.mark.parametrize(
    ("config", "loss", "tower"),
    [(VPTConfig(), "text_consistency", "text"), (CoOpConfig(), "image_consistency", "vision")],
)
def test_a_loss_of_a_tower_without_prompts_is_refused(config, loss, tower, clip, processor, tasks, arguments):
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    sentence = f"{loss} compares features of the {tower} tower, which {type(config).__name__} does not change"
    with pytest.raises(ValueError, match=sentence):
        MultiTaskTrainer(classifier, arguments(**{loss: 1.0}))
    MultiTaskTrainer(classifier, arguments(logit_consistency=1.0))


@pytest.mark.parametrize(
    ("setting", "value", "without", "with_it"),
    [
        ("frozen_texts", "task", {"image_consistency": 1.0}, {"logit_consistency": 1.0}),
        ("feature_distance", "cosine", {"logit_consistency": 1.0}, {"image_consistency": 1.0}),
        ("average_std", 0.1, {}, {"average_mean": 0.5}),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(
    setting, value, without, with_it, clip, processor, tasks, arguments
):
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(num_prompts=4, source_shape=(2, 4)))
    with pytest.raises(ValueError, match=f"{setting}={value!r} would change nothing"):
        MultiTaskTrainer(classifier, arguments(**{setting: value}, **without))
    MultiTaskTrainer(classifier, arguments(**{setting: value}, **with_it))


def test_a_class_name_that_is_too_long_for_the_templates_stops_before_training(make, arguments):
    long = Task("long", ["sun", "a sun over a wall of snow"], template="{}", train=[])
    classifier = make(groups=False, own_tasks=[long])
    with pytest.raises(ValueError, match=r"20 positions; .* Or write frozen_texts='task'"):
        MultiTaskTrainer(classifier, arguments(text_consistency=1.0))._make_consistency(["long"])
