"""Prompts come into a model by hooks: others that are there stay, before, meanwhile and after."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel, get_peft_model

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    MultiTaskClassifier,
    lora_config,
)
from mmap_peft.data.pictograms import draw

from ..conftest import tiny_clip
from .test_threads import CONFIGS


METHOD = pytest.mark.parametrize("name", CONFIGS)


def wrapped(name, clip=None, **fields):
    clip = tiny_clip() if clip is None else clip
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for field, value in fields.items():
        setattr(config, field, value)
    return get_peft_model(clip, config).eval()


class Counter(ModelHook):
    """Counts the forward passes of a module, by accelerate's hooks."""

    runs = 0

    def pre_forward(self, module, *args, **kwargs):
        self.runs += 1
        return args, kwargs


@METHOD
@pytest.mark.parametrize("first", [True, False])
def test_what_wraps_a_forward_stays(first, name, inputs):
    """Hooks of accelerate and of torch, put on before or after the prompts."""
    clip = tiny_clip()
    counters, calls = [], []

    def put_on():
        for part in (clip.vision_model, clip.vision_model.encoder, *clip.vision_model.encoder.layers):
            counters.append(Counter())
            add_hook_to_module(part, counters[-1])
            part.register_forward_pre_hook(lambda *_: calls.append("before"))
            part.register_forward_hook(lambda *_: calls.append("after"))

    if first:
        put_on()
    model = wrapped(name, clip)
    if not first:
        put_on()
    found = model(**inputs).logits_per_image
    assert torch.equal(found, wrapped(name)(**inputs).logits_per_image)
    assert [counter.runs for counter in counters] == [1] * 4
    base = model.unload()
    base(**inputs)
    assert [counter.runs for counter in counters] == [2] * 4
    assert calls.count("before") == calls.count("after") == 8
    for part in (clip.vision_model, clip.vision_model.encoder, *clip.vision_model.encoder.layers):
        remove_hook_from_module(part)
    assert torch.equal(base(**inputs).logits_per_image, tiny_clip()(**inputs).logits_per_image)


@METHOD
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@pytest.mark.parametrize("offload", ["cpu", "disk", "map before", "map after"])
def test_offloading(offload, name, inputs, tmp_path):
    expected = wrapped(name)(**inputs).logits_per_image
    clip = tiny_clip()
    places = {"text_model": "cpu", "vision_model": "disk", "text_projection": "cpu", "visual_projection": "cpu"}
    if offload == "map before":
        dispatch_model(clip, {**places, "logit_scale": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    model = wrapped(name, clip)
    if offload == "map after":
        places = {**places, "logit_scale": "cpu", "mmap": "cpu"}
        dispatch_model(clip, places, main_device="cpu", offload_dir=tmp_path)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    if offload == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mmap", "vpt"])
def test_a_classifier_of_an_offloaded_clip(name, processor, tasks, tmp_path):
    images = [draw("print", "sun", 0), draw("photo", "star", 1)]
    expected = MultiTaskClassifier(tiny_clip(), processor, tasks, CONFIGS[name]).predict(images, task="photo")
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, CONFIGS[name])
    cpu_offload(classifier.clip, execution_device=torch.device("cpu"))
    found = classifier.predict(images, task="photo")
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-5, rtol=1e-5)
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path, model=tiny_clip(), processor=processor)
    found = again.predict(images, task="photo")
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [BitFitConfig, BottleneckAdapterConfig, lora_config])
def test_methods_that_start_from_weights_refuse_an_offloaded_clip(config, processor, tasks):
    clip = tiny_clip()
    cpu_offload(clip, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"CLIPModel is offloaded.*make the classifier first"):
        MultiTaskClassifier(clip, processor, tasks, config())


# ---- modules that PEFT copies


REFUSED = ["layers.0", "encoder", "vision_model", "text_model", "layers"]
COPIED = ["token_embedding", "embeddings", "position_embedding", "visual_projection", "layer_norm1", "fc1", "k_proj"]


@METHOD
@pytest.mark.parametrize("modules", REFUSED)
def test_modules_to_save_that_hold_encoder_layers_are_refused(modules, name, inputs):
    clip = tiny_clip()
    with pytest.raises(ValueError, match=r"modules_to_save=\[.*\] matches '.*', which holds encoder layers"):
        get_peft_model(clip, type(CONFIGS[name])(modules_to_save=[modules]))
    assert torch.equal(clip(**inputs).logits_per_image, tiny_clip()(**inputs).logits_per_image)
    assert not any(module._forward_pre_hooks for module in clip.modules())


@METHOD
@pytest.mark.parametrize("modules", COPIED)
def test_modules_to_save_train_beside_the_prompts(modules, name, inputs, tmp_path):
    model = wrapped(name, modules_to_save=[modules])
    assert torch.equal(model(**inputs).logits_per_image, wrapped(name)(**inputs).logits_per_image)
    model(**inputs).logits_per_image.square().sum().backward()
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    prompts = [parameter for key, parameter in parameters.items() if "mmap." in key]
    assert prompts and all(parameter.grad.abs().max() > 0 for parameter in prompts)
    assert sum("mmap_generators" in key for key in parameters) == len(prompts)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_clip(), str(tmp_path)).eval()
    torch.testing.assert_close(
        again(**inputs).logits_per_image, model(**inputs).logits_per_image, atol=1e-5, rtol=1e-5
    )
