import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from mmap_peft import LinearProbeConfig, MultiTaskClassifier


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig()).eval()


def test_logits_are_the_formula(classifier, clip):
    """exp(logit_scale) W x + b with a unit image feature x, each image by the probe of its own task."""
    pixels = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for task in classifier.tasks:
            for parameter in classifier.adapter_parameters(task).values():
                parameter.normal_()
        found = classifier(pixels, torch.tensor([2, 0, 1, 0])).logits
        features = F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1)
        for row, task in enumerate(("photo", "print", "clipart", "print")):
            probe = classifier.adapter_parameters(task)
            expected = clip.logit_scale.exp() * probe["weight"] @ features[row] + probe["bias"]
            torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-4, rtol=1e-5)
            assert (found[row, len(expected) :] == float("-inf")).all()


def test_it_starts_from_the_text_features(classifier, clip, processor):
    for task in classifier.tasks.values():
        ids = processor.tokenizer([texts[0] for texts in task.texts], return_tensors="pt", padding=True)["input_ids"]
        with torch.no_grad():
            expected = F.normalize(clip.get_text_features(ids).pooler_output, dim=-1)
        probe = classifier.adapter_parameters(task.adapter)
        torch.testing.assert_close(probe["weight"].detach(), expected, atol=1e-6, rtol=1e-5)
        assert not probe["bias"].any()
        assert sum(parameter.numel() for parameter in probe.values()) == len(task.class_names) * (16 + 1)


def test_images_and_texts_need_no_gradient_of_the_towers(classifier):
    calls = []
    text, image = classifier.clip.get_text_features, classifier.clip.get_image_features
    classifier.clip.get_text_features = lambda *args: calls.append("text") or text(*args)
    classifier.clip.get_image_features = lambda *args: calls.append(image(*args)) or calls[-1]
    classifier.train()(torch.randn(2, 3, 48, 48), torch.tensor([0, 1]), torch.tensor([0, 0])).loss.backward()
    (output,) = calls  # no text is encoded
    assert not output.pooler_output.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_of_half_precision(dtype, clip_folder, processor, tasks):
    clip = CLIPModel.from_pretrained(clip_folder, dtype=dtype)
    classifier = MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig())
    assert {p.dtype for name in classifier.adapters for p in classifier.adapter_parameters(name).values()} == {
        torch.float32
    }
    output = classifier(torch.randn(2, 3, 48, 48).to(dtype), torch.tensor([0, 1]), torch.tensor([0, 0]))
    output.loss.backward()
    assert output.loss.isfinite()
