"""Prediction among other classes and by other templates, with every method."""

import pytest
import torch
from torch.nn import functional as F

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    MultiTaskClassifier,
    Task,
    TaskGrouping,
    VPTConfig,
    lora_config,
    use_routes,
)
from mmap_peft.data.pictograms import draw


METHODS = {
    "zero-shot": lambda: None,
    "mmap": lambda: MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5),
    "coop": lambda: CoOpConfig(num_prompts=2, init_std=0.5, init_ids=[]),
    "coop, name in front": lambda: CoOpConfig(num_prompts=2, init_std=0.5, position="front", init_ids=[]),
    "vpt": lambda: VPTConfig(num_prompts=2, init_std=0.5),
    "ivlp": lambda: IVLPConfig(num_prompts=2, init_std=0.5, init_ids=[]),
    "maple": lambda: MaPLeConfig(num_prompts=2, init_std=0.5, init_ids=[]),
    "mmrl tokens": lambda: MMRLTokensConfig(first_layer=1, init_std=0.5),
    "full fine-tuning": FullFineTuningConfig,
    "bitfit": BitFitConfig,
    "bottleneck": BottleneckAdapterConfig,
    "lora": lora_config,
}
BOUND = {
    "linear probe": LinearProbeConfig,
    "contexts of classes": lambda: CoOpConfig(num_prompts=2, init_std=0.5, num_classes=4, init_ids=[]),
}
NAMES = ["sun", "cloud", "star", "heart"]
OTHERS = ["umbrella", "star", "small snowman"]
IMAGES = [draw("print", "sun", 0), draw("photo", "star", 1), draw("photo", "heart", 2)]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def make(clip, processor, method, tasks=None):
    """A classifier whose adapters are not those of the start."""
    tasks = tasks or [Task("print", NAMES), Task("photo", NAMES[::-1], template="a picture of a {}.")]
    classifier = MultiTaskClassifier(clip, processor, tasks, {**METHODS, **BOUND}[method]())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in classifier.adapters:
            for parameter in classifier.adapter_parameters(name).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return classifier


@pytest.fixture
def mmap(clip, processor):
    classifier = make(clip, processor, "mmap")
    classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))
    return classifier


@pytest.mark.parametrize("method", [*METHODS, *BOUND])
def test_classes_of_the_task_in_any_order_and_number(method, clip, processor):
    classifier = make(clip, processor, method)
    expected = classifier.predict(IMAGES, "print").probabilities
    found = classifier.predict(IMAGES, "print", class_names=["Sun", "CLOUD", "star", "heart"])
    assert torch.equal(found.probabilities, expected)
    order = [2, 0, 3, 1]
    permuted = classifier.predict(IMAGES, "print", class_names=[NAMES[number] for number in order])
    torch.testing.assert_close(permuted.probabilities, expected[:, order], **CLOSE)
    assert permuted.labels == found.labels
    part = classifier.predict(IMAGES, "print", class_names=["heart", "cloud"])
    chosen = expected[:, [3, 1]]
    torch.testing.assert_close(part.probabilities, chosen / chosen.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert part.labels == [["heart", "cloud"][number] for number in chosen.argmax(1).tolist()]


@pytest.mark.parametrize("method", METHODS)
def test_other_classes_equal_a_classifier_of_them_with_the_same_adapters(method, clip, clip_folder, processor):
    classifier = make(clip, processor, method)
    found = classifier.predict(IMAGES, "photo", class_names=OTHERS)
    before = classifier.predict(IMAGES, "photo").probabilities
    other = make(
        type(clip).from_pretrained(clip_folder),
        processor,
        method,
        [Task("photo", OTHERS, template="a picture of a {}.")],
    )
    for adapter in classifier.adapters:
        other.load_adapter_state(adapter, classifier.adapter_state(adapter))
    expected = other.predict(IMAGES, "photo")
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-5, rtol=1e-4)
    assert found.labels == expected.labels
    assert torch.equal(classifier.predict(IMAGES, "photo").probabilities, before)
    # The order of the names is the order of the answer, and part of them is the rest scaled to 1.
    turned = classifier.predict(IMAGES, "photo", class_names=OTHERS[::-1]).probabilities
    torch.testing.assert_close(turned.flip(1), found.probabilities, atol=1e-5, rtol=1e-4)
    part = classifier.predict(IMAGES, "photo", class_names=OTHERS[1:]).probabilities
    chosen = found.probabilities[:, 1:]
    torch.testing.assert_close(part, chosen / chosen.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", BOUND)
def test_parameters_for_each_class_know_no_other_classes(method, clip, clip_folder, processor):
    classifier = make(clip, processor, method)
    expected = classifier.predict(IMAGES, "print").probabilities
    with pytest.raises(
        ValueError, match=r"'print' has no class 'umbrella', and (LinearProbe|CoOp)Config has parameters"
    ):
        classifier.predict(IMAGES, "print", class_names=OTHERS)
    assert torch.equal(classifier.predict(IMAGES, "print").probabilities, expected)
    plain = MultiTaskClassifier(type(clip).from_pretrained(clip_folder), processor, [Task("print", NAMES)])
    with classifier.zero_shot():
        found = classifier.predict(IMAGES, "print", class_names=OTHERS, templates="one {}")
    expected = plain.predict(IMAGES, "print", class_names=OTHERS, templates="one {}")
    torch.testing.assert_close(found.probabilities, expected.probabilities, **CLOSE)


def test_a_probe_reads_no_templates_and_contexts_of_classes_do(clip, clip_folder, processor):
    with pytest.raises(ValueError, match="'print' has a linear probe, which uses no texts"):
        make(clip, processor, "linear probe").predict(IMAGES, "print", templates="one {}")
    texts = "a picture of a small {}."
    base = type(clip).from_pretrained(clip_folder)
    expected = make(clip, processor, "contexts of classes", [Task("print", NAMES, template=texts)])
    classifier = make(base, processor, "contexts of classes")
    found = classifier.predict(IMAGES, "print", class_names=["star", "sun"], templates=texts).probabilities
    expected = expected.predict(IMAGES, "print", class_names=["star", "sun"]).probabilities
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("method", ["zero-shot", "mmap", "vpt", "lora", "coop"])
def test_templates_are_the_normalised_mean_of_normalised_features(method, clip, processor):
    classifier = make(clip, processor, method).eval()
    templates = ["a photo of a {}.", "one very small {} on a wall", "a picture of the {}"]

    def feature(text):
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        return F.normalize(classifier.clip.get_text_features(ids).pooler_output, dim=-1)[0]

    def features(names):
        return torch.stack([F.normalize(sum(feature(t.replace("{}", n)) for t in templates), dim=-1) for n in names])

    pixels = processor.image_processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if classifier.uses_prompts:
            with use_routes(classifier.model, ("global",)):
                weights = {"print": features(NAMES), "other": features(OTHERS)}
                images = F.normalize(classifier.clip.get_image_features(pixels).pooler_output, dim=-1)
        else:
            weights = {"print": features(NAMES), "other": features(OTHERS)}
            images = F.normalize(classifier.clip.get_image_features(pixels).pooler_output, dim=-1)
    for names, weight in ((None, weights["print"]), (OTHERS, weights["other"])):
        expected = (classifier.logit_scale().detach() * images @ weight.T).softmax(-1)
        found = classifier.predict(IMAGES, "print", class_names=names, templates=templates).probabilities
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    one = classifier.predict(IMAGES, "print", templates=templates[0]).probabilities
    torch.testing.assert_close(one, classifier.predict(IMAGES, "print").probabilities, atol=1e-5, rtol=1e-4)


def test_texts_of_classes_stay_with_their_classes_unless_templates_are_given(clip, processor):
    texts = {"sun": "the sun is shining"}
    classifier = make(clip, processor, "ivlp", [Task("print", NAMES, class_texts=texts), Task("photo", NAMES)])
    expected = classifier.predict(IMAGES, "print").probabilities
    found = classifier.predict(IMAGES, "print", class_names=[*NAMES, "umbrella"]).probabilities[:, :4]
    torch.testing.assert_close(found / found.sum(1, keepdim=True), expected, atol=1e-5, rtol=1e-4)
    by_template = [
        classifier.predict(IMAGES, task, templates="a photo of a {}.").probabilities for task in ("print", "photo")
    ]
    torch.testing.assert_close(*by_template, **CLOSE)
    assert (by_template[0] - expected).abs().max() > 1e-3


def test_a_batch_of_several_tasks(mmap):
    tasks = ["photo", "print", "photo"]
    for names in (OTHERS, ["star", "sun"]):
        found = mmap.predict(IMAGES, tasks, class_names=names)
        assert found.probabilities.shape == (3, len(names))
        for row, task in enumerate(tasks):
            alone = mmap.predict(IMAGES[row], task, class_names=names)
            torch.testing.assert_close(found.probabilities[row], alone.probabilities[0], atol=1e-5, rtol=1e-4)
            assert found.labels[row] == alone.labels[0]
    for task in ("photo", []):
        assert mmap.predict([], task, class_names=OTHERS).probabilities.shape == (0, 3)


def test_without_a_task_the_tasks_found_share_the_class_names(clip, processor):
    tasks = [
        Task(style, NAMES[:3], train=[(draw(style, name, number), name) for name in NAMES[:3] for number in (1, 2)])
        for style in ("print", "photo")
    ]
    classifier = make(clip, processor, "mmap", tasks)
    with pytest.raises(ValueError, match="no prototypes"):
        classifier.predict(IMAGES, class_names=OTHERS)
    classifier.compute_prototypes()
    found = classifier.predict(IMAGES, class_names=OTHERS)
    weights = found.task_probabilities.masked_fill(found.task_probabilities < 0.05, 0)
    weights = weights / weights.sum(1, keepdim=True)
    parts = [classifier.predict(IMAGES, task.name, class_names=OTHERS).probabilities for task in tasks]
    torch.testing.assert_close(found.probabilities, sum(w[:, None] * p for w, p in zip(weights.T, parts)), **CLOSE)
    assert found.class_names == OTHERS
    assert found.labels == [OTHERS[number] for number in found.probabilities.argmax(1).tolist()]
    assert classifier.predict([], class_names=OTHERS).probabilities.shape == (0, 3)
