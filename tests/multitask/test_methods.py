"""The classifier and its trainer with every prompt method."""

import pytest
import torch

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MMRLTokensConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    PromptSRCConfig,
    Task,
    TaskGrouping,
    VPTConfig,
    use_routes,
)
from mmap_peft.data.pictograms import draw

from ..conftest import make_task


CONFIGS = {
    "coop": CoOpConfig(num_prompts=2, init_std=0.1),
    "coop, name in front": CoOpConfig(num_prompts=3, init_std=0.1, position="front"),
    "vpt": VPTConfig(num_prompts=3, init_std=0.1),
    "ivlp": IVLPConfig(num_prompts=2, num_vision_prompts=3, vision_depth=1, init_std=0.1),
    "promptsrc": PromptSRCConfig(num_prompts=2, depth=2, init_std=0.1),
    "mmrl tokens": MMRLTokensConfig(num_prompts=2, token_size=8, first_layer=1, init_std=0.5),
    "maple": MaPLeConfig(num_prompts=2, init_std=0.1),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def classifier(clip, processor, tasks, config):
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    classifier.set_grouping(TaskGrouping.by_mode("given", list(classifier.tasks), [["print", "photo"], ["clipart"]]))
    return classifier.eval()


def texts(classifier, name):
    """Written by hand: placeholders for the prompts of a group and a task."""
    count = 2 * classifier.adapter_config.placeholders
    task = classifier.tasks[name]
    if not count or (count <= 4 and getattr(classifier.adapter_config, "position", "end") == "end"):
        return [texts[0] for texts in task.texts]
    return [" ".join(["X"] * count) + f" {name}." for name in task.class_names]


def test_a_batch_of_all_tasks_equals_the_models_own_forward_for_each(classifier):
    pixels = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([2, 0, 1, 2])
    with torch.no_grad():
        found = classifier(pixels, numbers).logits
        for row, number in enumerate(numbers.tolist()):
            name = list(classifier.tasks)[number]
            ids = classifier.processor.tokenizer(texts(classifier, name), return_tensors="pt", padding=True)
            with use_routes(classifier.model, classifier.routes[name]):
                output = classifier.model(input_ids=ids["input_ids"], pixel_values=pixels[row : row + 1])
            expected = output.logits_per_image[0]
            torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-4, rtol=1e-5)


def test_each_prompt_gets_its_tasks_gradient(classifier):
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    classifier(pixels, torch.tensor([0, 0]), torch.tensor([0, 1])).loss.backward()
    for adapter in classifier.adapters:
        for name, parameter in classifier.adapter_parameters(adapter).items():
            used = adapter in ("group_0", "print")
            assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == used, (adapter, name)


def test_training_changes_the_prompts_and_a_folder_gives_them_back(
    clip, processor, tasks, config, arguments, tmp_path
):
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    image = draw("print", "sun", 0)
    before = classifier.predict(image, "photo").probabilities
    MultiTaskTrainer(model=classifier, args=arguments()).train()
    after = classifier.predict(image, "photo").probabilities
    assert not torch.equal(after, before)
    classifier.save_pretrained(tmp_path / "saved")
    again = MultiTaskClassifier.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.predict(image, "photo").probabilities, after, atol=1e-6, rtol=1e-5)
    assert type(again.adapter_config) is type(config)


def test_prompts_start_from_words(clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, CoOpConfig(num_prompts=2))
    words = processor.tokenizer("a photo", add_special_tokens=False)["input_ids"]
    expected = classifier.clip.text_model.embeddings.token_embedding.weight[words]
    assert torch.equal(classifier.adapter_parameters("global")["text_prompts"], expected)
    # With those of the template, the words that are left, it begins as zero-shot.
    with classifier.zero_shot():
        plain = classifier.predict(draw("print", "sun", 0), "print").probabilities
    found = classifier.predict(draw("print", "sun", 0), "print").probabilities
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)


def test_class_specific_contexts(clip, processor):
    names = ["sun", "cloud", "star"]
    config = CoOpConfig(num_prompts=2, num_classes=3, init_ids=[], init_std=0.5)
    classifier = MultiTaskClassifier(clip, processor, [Task("one", names), Task("two", names)], config).eval()
    before = classifier.predict(draw("print", "sun", 0), "two").probabilities.log()
    with torch.no_grad():
        classifier.adapter_parameters("global")["text_prompts"][1].normal_()
    after = classifier.predict(draw("print", "sun", 0), "two").probabilities.log()
    change = (after - before)[0]
    assert change[0] == pytest.approx(change[2].item(), abs=1e-4)  # both by the norm of the softmax only
    assert abs(change[1] - change[0]) > 1e-3
    with pytest.raises(ValueError, match="num_classes=3 contexts"):
        classifier.add_task(make_task("photo", 4))


def test_texts_without_prompts_run_once_and_gradients_are_the_same(clip, processor, tasks, monkeypatch):
    classifier = MultiTaskClassifier(clip, processor, tasks, VPTConfig(num_prompts=2, init_std=0.1)).train()
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    batch = pixels, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    parameters = list(classifier.adapter_parameters("global").values())
    rows = []
    plain = clip.get_text_features
    monkeypatch.setattr(clip, "get_text_features", lambda ids, **kwargs: rows.append(len(ids)) or plain(ids, **kwargs))
    expected = torch.autograd.grad(classifier(*batch).loss, parameters)
    with torch.no_grad():
        parameters[0].add_(0)  # as a step of the optimizer does
    found = torch.autograd.grad(classifier(*batch).loss, parameters)
    assert rows == [12]
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
    with torch.no_grad():
        clip.text_projection.weight.add_(1)
    classifier(*batch)
    assert rows == [12, 12]
