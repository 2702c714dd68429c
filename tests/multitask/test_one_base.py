"""One CLIP is the base of one classifier, a refused call changes nothing, and text features are never stale."""

import numpy as np
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CLIPAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    VPTConfig,
    lora_config,
    use_routes,
)
from mmap_peft.data.pictograms import draw

from ..conftest import load_clip, make_task


METHODS = {
    "zero-shot": lambda: None,
    "linear probe": LinearProbeConfig,
    "clip-adapter": CLIPAdapterConfig,
    "mmap": lambda: MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5),
    "mmap, probe": lambda: MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5, probe=True),
    "coop": lambda: CoOpConfig(init_std=0.5),
    "vpt": lambda: VPTConfig(init_std=0.5),
    "ivlp": lambda: IVLPConfig(init_std=0.5),
    "full fine-tuning": FullFineTuningConfig,
    "bitfit": BitFitConfig,
    "bottleneck": BottleneckAdapterConfig,
    "lora": lambda: lora_config(init_lora_weights=False),
}
METHOD = pytest.mark.parametrize("name", METHODS)
ADAPTERS = [name for name in METHODS if name not in ("zero-shot", "linear probe", "clip-adapter")]


def state(clip):
    """All that putting adapters into a model may change."""
    return {
        "keys": list(clip.state_dict()),
        "modules": [(name, type(module), module.training) for name, module in clip.named_modules()],
        "flags": [parameter.requires_grad for parameter in clip.parameters()],
        "hooks": [
            [len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)] for module in clip.modules()
        ],
        "attributes": ["forward" in vars(module) for module in clip.modules()],
        "attention": [type(layer.self_attn.config) for layer in clip.text_model.encoder.layers],
    }


def predict(classifier):
    return classifier.predict([draw("print", "sun", 0), draw("photo", "star", 1)], task="print").probabilities


# ---- one base


@METHOD
@pytest.mark.parametrize("first", ADAPTERS)
def test_a_used_clip_is_refused_and_the_first_classifier_goes_on(first, name, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, METHODS[first]())
    expected, before = predict(classifier), state(clip)
    with pytest.raises(ValueError, match="has the adapters global already"):
        MultiTaskClassifier(clip, processor, tasks, METHODS[name]())
    assert state(clip) == before
    assert torch.equal(predict(classifier), expected)


@pytest.mark.parametrize("first", ADAPTERS)
def test_a_clip_that_was_unloaded_is_as_new(first, clip, clip_folder, processor, tasks):
    before, again = state(clip.requires_grad_(False)), METHODS["mmap"]()
    assert state(MultiTaskClassifier(clip, processor, tasks, METHODS[first]()).unload()) == before
    expected = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, again)
    found = MultiTaskClassifier(clip, processor, tasks, again)
    assert torch.equal(predict(found), predict(expected))


@METHOD
@pytest.mark.parametrize("fault", ["no task", "same names", "long text", "text_chunk", "settings"])
def test_a_refused_call_leaves_the_clip_as_it_was(fault, name, clip, processor, tasks):
    config, fields = METHODS[name](), {}
    if fault == "no task":
        tasks = []
    elif fault == "same names":
        tasks = [*tasks, make_task("print", 3)]
    elif fault == "long text":
        tasks = [*tasks, make_task("sketch", 3, template="a photo of a {} " + "on a wall " * 9)]
    elif fault == "text_chunk":
        fields = {"text_chunk": 0}
    elif not hasattr(config, "depth"):
        pytest.skip("no setting that the model can be too small for")
    else:
        config.depth = 99
    before = state(clip)
    with pytest.raises(ValueError):
        MultiTaskClassifier(clip, processor, tasks, config, **fields)
    assert state(clip) == before


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("second", [None, "mmap", "vpt", "coop"])
@pytest.mark.parametrize("first", ["whole", "tower"])
def test_layers_of_another_model_with_prompts_are_refused(first, second, clip, clip_folder, processor, tasks, inputs):
    other = load_clip(clip_folder)
    other.vision_model, other.text_model = clip.vision_model, clip.text_model
    model = get_peft_model(clip if first == "whole" else clip.vision_model, METHODS["vpt"]()).eval()
    given = inputs if first == "whole" else {"pixel_values": inputs["pixel_values"]}
    expected, before = model(**given)[1 if first == "tower" else 0], state(other)
    with pytest.raises(ValueError, match=r"have prompts already, of another model|has the adapters default already"):
        MultiTaskClassifier(other, processor, tasks, METHODS[second]() if second else None)
    for base in (other, clip.vision_model if first == "whole" else clip):
        if second and not (second == "coop" and base is clip.vision_model):
            with pytest.raises(ValueError, match="have prompts already, of another model"):
                get_peft_model(base, METHODS[second](), adapter_name="x")
    assert state(other) == before
    assert torch.equal(model(**given)[1 if first == "tower" else 0], expected)


# ---- modules_to_save


@pytest.mark.parametrize("name", ["mmap", "coop", "vpt", "ivlp"])
def test_modules_to_save_are_refused_where_routes_would_need_several(name, clip, processor, tasks, inputs):
    config = METHODS[name]()
    config.modules_to_save = ["visual_projection"]
    with pytest.raises(ValueError, match=r"modules_to_save=.* is not possible with prompts of many tasks"):
        MultiTaskClassifier(clip, processor, tasks, config)
    model = get_peft_model(clip, config, adapter_name="x")
    model.add_adapter("y", METHODS[name]())
    with use_routes(model, ("x",)):
        model(**inputs)
    for routes in (("y",), ("x", "y"), (), [("x",), ("y",)]):
        with pytest.raises(ValueError, match="Adapters x have modules_to_save"), use_routes(model, routes):
            pass
    model.set_adapter("y")
    model.delete_adapter("x")
    with use_routes(model, ("y",)):
        model(**inputs)


@pytest.mark.parametrize("module", ["visual_projection", "mlp"])
def test_the_base_of_modules_to_save_comes_back(module, clip, processor, tasks):
    """On starting anew, too, and in the export of the classifier without its adapter."""
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    zero_shot = MultiTaskClassifier(clip, processor, tasks).export("print")(pixels)
    classifier = MultiTaskClassifier(clip, processor, tasks, lora_config(modules_to_save=[module]))
    with torch.no_grad():
        for parameter in classifier.adapter_parameters("global").values():
            parameter.add_(0.5)
    with classifier.zero_shot():
        torch.testing.assert_close(classifier.export("print")(pixels), zero_shot)
    classifier.reset_adapters()
    assert all(torch.equal(value, before[key]) for key, value in classifier.unload().state_dict().items())


# ---- features that are kept


def write_data(parameter):
    parameter.data = parameter.data + 0.5


def write_into_data(parameter):
    parameter.data.add_(0.5)


def write_by_numpy(parameter):
    array = parameter.detach().numpy()
    np.add(array, 0.5, out=array)


def write_one_element(parameter):
    parameter.detach().numpy().flat[-1] += 5


def average(parameter):  # as an exponential moving average does
    parameter.data.mul_(0.5).add_(torch.ones_like(parameter), alpha=0.5)


WRITES = [write_data, write_into_data, write_by_numpy, average]


@pytest.mark.parametrize("write", [*WRITES, write_one_element])
@pytest.mark.parametrize("name", ["mmap", "coop", "bitfit", "bottleneck", "lora"])
def test_text_features_are_made_again_after_adapters_are_written(name, write, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, METHODS[name]()).eval()
    predict(classifier)
    names = [key for key in classifier.adapter_parameters("global") if "vision" not in key and "k_proj" not in key]
    for key in names[:3]:
        write(classifier.adapter_parameters("global")[key])
    expected = classifier.encode_texts(["print"])[0]
    torch.testing.assert_close(classifier.class_weights("print")[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "part", ["text_projection", "text_model.encoder.layers.0.mlp.fc1", "text_model.embeddings.token_embedding"]
)
@METHOD
def test_text_features_are_made_again_after_the_base_is_written(name, part, write, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, METHODS[name]()).eval()
    with classifier.zero_shot():
        predict(classifier)
        write(classifier.clip.get_parameter(f"{part}.weight") if name != "lora" else parameter_of(classifier, part))
        expected = classifier.encode_texts(["print"])[0]
        torch.testing.assert_close(classifier.class_weights("print")[0], expected, atol=1e-6, rtol=1e-5)


def parameter_of(classifier, part):
    module = classifier.clip.get_submodule(part)
    return getattr(module, "base_layer", module).weight


@METHOD
def test_text_features_are_made_again_after_a_module_is_swapped(name, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, METHODS[name]()).eval()
    with classifier.zero_shot():
        predict(classifier)
        classifier.clip.text_model.encoder.layers[0].mlp.activation_fn = torch.nn.ReLU()  # it has no parameters
        expected = classifier.encode_texts(["print"])[0]
        torch.testing.assert_close(classifier.class_weights("print")[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["mmap", "lora", "bitfit"])
def test_disabled_adapters_have_features_of_their_own(name, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, METHODS[name]()).eval()
    with torch.no_grad():
        for parameter in classifier.adapter_parameters("global").values():
            parameter.add_(0.3)
    prompted = predict(classifier)
    with classifier.model.disable_adapter():
        plain = predict(classifier)
    with classifier.zero_shot():
        torch.testing.assert_close(plain, predict(classifier), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain, prompted, atol=1e-4)
    assert torch.equal(predict(classifier), prompted)


@METHOD
def test_inference_mode_changes_nothing(name, clip, clip_folder, processor, tasks):
    """A classifier is made, used and trained inside or outside of it, in any order."""
    expected = predict(MultiTaskClassifier(load_clip(clip_folder), processor, tasks, METHODS[name]()))
    with torch.inference_mode():
        classifier = MultiTaskClassifier(clip, processor, tasks, METHODS[name]())
        inside = predict(classifier)
    assert torch.equal(inside, expected)
    assert torch.equal(predict(classifier), expected)
    if name == "zero-shot":
        return
    pixels = processor.image_processor(images=[draw("print", "sun", 0)] * 2, return_tensors="pt")["pixel_values"]
    classifier.train()(pixels, torch.tensor([0, 2]), torch.tensor([0, 1])).loss.backward()
    for adapter in classifier.adapters:
        gradients = [parameter.grad for parameter in classifier.adapter_parameters(adapter).values()]
        assert name in ("linear probe", "clip-adapter") or any(gradient is not None for gradient in gradients)
    with torch.inference_mode():
        assert torch.equal(predict(classifier), expected)


def test_adapters_that_were_deleted_leave_nothing(clip):
    model = get_peft_model(clip, METHODS["mmap"](), adapter_name="x")
    for name in ("y", "z"):
        model.add_adapter(name, METHODS["mmap"]())
    model.set_adapter("z")
    for name in ("y", "x"):
        model.delete_adapter(name)
        assert name not in clip.mmap.layers
        with pytest.raises(KeyError):
            model.peft_config[name]
        with pytest.raises(KeyError):
            get_peft_model_state_dict(model, adapter_name=name)
    assert set(clip.mmap.layers) == set(clip.mmap.mmap_generators) == set(model.peft_config) == {"z"}
