"""WiSE-FT: the ends are the base and the adapter to the bit, what lies between is the formula."""

import re

import pytest
import torch
from transformers import CLIPModel

from mmap_peft import (
    BitFitConfig,
    FullFineTuningConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    choose_wise_ft_alpha,
    lora_config,
    wise_ft,
)


CONFIGS = {
    "full": FullFineTuningConfig,
    "vision": lambda: FullFineTuningConfig(parameters=r"(vision_model|visual_projection)\..*"),
    "bitfit": BitFitConfig,
}


@pytest.fixture
def make(clip_folder, processor, tasks):
    """Makes a classifier; tuned parameters are at a distance from the base."""

    def classifier(config, dtype=torch.float32):
        base = CLIPModel.from_pretrained(clip_folder, dtype=dtype)
        with torch.no_grad():
            base.vision_model.post_layernorm.bias[0] = -0.0  # equal to 0.0, but not to the bit
        made = MultiTaskClassifier(base, processor, tasks, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.adapter_parameters("global").values() if made.adapters == ["global"] else ():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
        return made.eval()

    return classifier


def probabilities(classifier):
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    return classifier.probabilities(pixels.to(classifier.clip.dtype), ["print", "photo", "clipart"])


def state(classifier):
    return {name: tensor.clone() for name, tensor in classifier.adapter_state("global").items()}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_the_adapter_and_zero_shot_to_the_bit(make, config, dtype):
    classifier = make(config, dtype)
    trained, before = probabilities(classifier), state(classifier)
    with classifier.zero_shot():
        plain = probabilities(classifier)
    assert not torch.equal(trained, plain)
    wise_ft(classifier, 1)
    assert torch.equal(probabilities(classifier), trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(classifier).items())
    wise_ft(classifier, 0.0)
    assert torch.equal(probabilities(classifier), plain)
    base = dict(classifier.clip.named_parameters())
    for name, tensor in classifier.adapter_parameters("global").items():
        original = base[name.removeprefix("tuned.tuned_parameters.").replace("/", ".")]
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), original.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_between_them_is_the_formula(make, config, alpha):
    classifier, base = make(config), make(config)
    trained = state(classifier)
    wise_ft(base, 0)
    wise_ft(classifier, alpha)
    for name, tensor in state(classifier).items():
        expected = (1 - alpha) * state(base)[name].double() + alpha * trained[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_base_stays_and_two_calls_multiply(make):
    twice, once = make(BitFitConfig()), make(BitFitConfig())
    before = {name: value.clone() for name, value in once.clip.state_dict().items() if "tuned" not in name}
    wise_ft(twice, 0.5)
    wise_ft(twice, 0.4)
    wise_ft(once, 0.2)
    for name, tensor in state(once).items():
        torch.testing.assert_close(tensor, state(twice)[name])
    assert all(torch.equal(once.clip.state_dict()[name], value) for name, value in before.items())
    for classifier in (twice, once):
        assert classifier.record.settings["wise_ft_alpha"] == pytest.approx(0.2)


def test_it_is_saved_and_loaded_and_the_card_says_so(make, tmp_path):
    classifier = make(BitFitConfig())
    classifier.record.prompted = {"print": 0.5}
    wise_ft(classifier, 0.3)
    classifier.save_pretrained(tmp_path)
    assert "wise_ft_alpha" in (tmp_path / "README.md").read_text()
    loaded = MultiTaskClassifier.from_pretrained(tmp_path, model=make(None).clip)
    assert torch.equal(probabilities(loaded), probabilities(classifier))
    assert loaded.record.settings == {"wise_ft_alpha": 0.3}
    assert loaded.record.prompted == {}  # an accuracy of other weights


def test_the_best_alpha_of_validation_images_is_chosen(make, arguments):
    classifier = make(FullFineTuningConfig())
    trainer = MultiTaskTrainer(model=classifier, args=arguments())
    trained = state(classifier)
    found = choose_wise_ft_alpha(trainer, [1.0, 0.5, 0.0])
    assert list(found) == [1.0, 0.5, 0.0]
    best = max(found, key=found.get)
    assert trainer.evaluate()["eval_mean_accuracy"] == found[best]
    again = make(FullFineTuningConfig())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in state(again).items())
    wise_ft(again, best)
    assert all(torch.equal(tensor, state(again)[name]) for name, tensor in state(classifier).items())
    assert classifier.record.settings["wise_ft_alpha"] == best


def test_if_an_evaluation_fails_the_adapter_is_as_it_was(make, arguments, monkeypatch):
    classifier = make(BitFitConfig())
    trainer, before = MultiTaskTrainer(model=classifier, args=arguments()), state(classifier)

    def fail():
        raise OSError("an image is gone")

    monkeypatch.setattr(trainer, "evaluate", fail)
    with pytest.raises(OSError, match="an image is gone"):
        choose_wise_ft_alpha(trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(classifier).items())
    assert classifier.record.settings == {}


@pytest.mark.parametrize("config", [None, MmAPConfig(), LinearProbeConfig(), lora_config()], ids=str)
def test_other_methods_have_no_value_in_the_base(make, config):
    with pytest.raises(ValueError, match=r"WiSE-FT interpolates .* trained with FullFineTuningConfig\(\) or"):
        wise_ft(make(config))


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), "0.5", None, True])
def test_alpha_out_of_range(make, alpha):
    classifier = make(BitFitConfig())
    before = state(classifier)
    with pytest.raises(ValueError, match="for `alpha`: expected a finite number from 0 to 1"):
        wise_ft(classifier, alpha)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(classifier).items())


@pytest.mark.parametrize(("alphas", "place"), [([], "alphas"), ([0.5, 2], "alphas[1]"), (0.5, "alphas")])
def test_alphas_that_cannot_be_chosen_from(make, arguments, alphas, place):
    trainer = MultiTaskTrainer(model=make(BitFitConfig()), args=arguments())
    with pytest.raises(ValueError, match=re.escape(f"for `{place}`")):
        choose_wise_ft_alpha(trainer, alphas)
    with pytest.raises(ValueError, match="for `trainer`"):
        choose_wise_ft_alpha(trainer.model)
    with pytest.raises(ValueError, match="for `classifier`"):
        wise_ft(trainer)
