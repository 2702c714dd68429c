import pytest
import torch
from torch.nn import functional as F

from mmap_peft import CLIPAdapterConfig, MultiTaskClassifier


PIXELS = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def mixed(parameters, name, ratio, features):
    """ratio ReLU(V ReLU(U f)) + (1 - ratio) f"""
    first, second = parameters[f"{name}.0.weight"], parameters[f"{name}.2.weight"]
    return ratio * F.relu(second @ F.relu(first @ features.T)).T + (1 - ratio) * features


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(CLIPAdapterConfig(), [4]), (CLIPAdapterConfig(reduction=2, ratio=0.6, text_ratio=0.3), [8, 8])],
    ids=["as published", "with texts"],
)
def test_logits_are_the_formula(config, sizes, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, config).eval()
    numbers = [2, 0, 1, 0, 2]
    with torch.no_grad():
        for task in classifier.tasks:
            for parameter in classifier.adapter_parameters(task).values():
                parameter.normal_()
        found = classifier(PIXELS, torch.tensor(numbers)).logits
        features = clip.get_image_features(PIXELS).pooler_output
        for row, number in enumerate(numbers):
            task = list(classifier.tasks)[number]
            own = classifier.adapter_parameters(task)
            assert sum(parameter.numel() for parameter in own.values()) == sum(2 * 16 * size for size in sizes)
            image = F.normalize(mixed(own, "image", config.ratio, features[row : row + 1]), dim=-1)[0]
            text = classifier.encode_texts([task])[0]
            if config.text_ratio is not None:
                text = F.normalize(mixed(own, "text", config.text_ratio, text), dim=-1)
            expected = clip.logit_scale.exp() * text @ image
            torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-4, rtol=1e-5)


def test_the_settings_of_the_published_code_are_the_defaults():
    config = CLIPAdapterConfig()
    assert (config.reduction, config.ratio, config.text_ratio) == (4, 0.2, None)
    for name, value in ("reduction", 0), ("ratio", 0.0), ("ratio", 1.5), ("text_ratio", -0.1):
        with pytest.raises(ValueError, match=name):
            CLIPAdapterConfig(**{name: value})


def test_other_classes_are_classified_by_the_same_networks(clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, CLIPAdapterConfig(text_ratio=0.5)).eval()
    adapters, own = classifier.adapter_set, classifier.adapter_parameters("print")
    text = F.normalize(torch.randn(7, 16), dim=-1)
    assert adapters.weights_from_texts(("print",))
    for weights in (adapters.class_weights, adapters.other_class_weights):
        weight, bias = weights([("print",)], lambda: [text])
        torch.testing.assert_close(weight, F.normalize(mixed(own, "text", 0.5, text), dim=-1))
        assert bias == 0.0


def test_the_seed_decides_the_start(clip, clip_folder, processor, tasks):
    starts = [
        MultiTaskClassifier(clip, processor, tasks, CLIPAdapterConfig(), seed=seed).adapter_parameters("photo")
        for seed in (0, 0, 1)
    ]
    weights = [start["image.0.weight"] for start in starts]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
