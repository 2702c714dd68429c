"""A call that is refused leaves a model as it was, for every method, prompts too."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import CLIPModel

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    PromptSRCConfig,
    VPTConfig,
)


METHODS = {  # by name: settings, others of the same method, and some that do not fit a model
    "mmap": (MmAPConfig(), MmAPConfig(num_prompts=8), MmAPConfig(source_shape=(2, 5))),
    "coop": (CoOpConfig(), CoOpConfig(num_prompts=2), CoOpConfig(target_modules=r".*fc1")),
    "vpt": (VPTConfig(), VPTConfig(depth=1), VPTConfig(depth=9)),
    "ivlp": (IVLPConfig(), IVLPConfig(num_vision_prompts=2), IVLPConfig(vision_depth=9)),
    "promptsrc": (PromptSRCConfig(depth=2), PromptSRCConfig(depth=1), PromptSRCConfig()),
    "mmrl tokens": (MMRLTokensConfig(first_layer=1), MMRLTokensConfig(first_layer=0), MMRLTokensConfig()),
    "maple": (MaPLeConfig(), MaPLeConfig(depth=1), MaPLeConfig(depth=3)),
    "bitfit": (BitFitConfig(), BitFitConfig(parameters=r".*\.q_proj\.bias"), BitFitConfig(parameters="bias of q")),
    "full": (
        FullFineTuningConfig(),
        FullFineTuningConfig(parameters=r"vision_model\..*"),
        FullFineTuningConfig(parameters="weight"),
    ),
    "adapter": (
        BottleneckAdapterConfig(bottleneck_size=4),
        BottleneckAdapterConfig(bottleneck_size=2),
        BottleneckAdapterConfig(target_modules=r".*(fc2|layer_norm2)"),
    ),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def settings(method):
    return copy.deepcopy(METHODS[method])


def snapshot(clip, inputs):
    """All that a refused call could have changed."""
    with torch.no_grad():
        logits = clip.eval()(**inputs).logits_per_image
    held = dict(getattr(clip, "peft_config", {}))
    # "There is an adapter": transformers writes this before it asks PEFT, and where there is one it is true.
    unseen = {"_hf_peft_config_loaded"} if held else set()
    return {
        "tensors": {name: tensor.tolist() for name, tensor in clip.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in clip.named_parameters()},
        "attributes": {
            name: (type(module), sorted(vars(module).keys() - unseen)) for name, module in clip.named_modules()
        },
        "hooks": {
            name: [list(hooks.values()) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
            for name, module in clip.named_modules()
        },
        "settings": held,
        "logits": logits.tolist(),
    }


def other_method(method):
    return "bitfit" if method in ("mmap", "coop", "vpt", "ivlp", "promptsrc", "mmrl tokens", "maple") else "mmap"


TAKEN = {  # what asks for a name that is taken
    "get_peft_model": lambda clip, config: get_peft_model(clip, config),
    "inject_adapter_in_model": lambda clip, config: inject_adapter_in_model(config, clip),
    "transformers": lambda clip, config: clip.add_adapter(config),
}


@pytest.mark.parametrize("call", TAKEN)
def test_a_name_that_is_taken(call, method, clip, inputs):
    first, second, _ = settings(method)
    get_peft_model(clip, first)
    before = snapshot(clip, inputs)
    for config in (second, settings(other_method(method))[0]):
        with pytest.raises(ValueError, match=r"dapter with (the )?name '?default.*(Write|use) "):
            TAKEN[call](clip, config)
        assert snapshot(clip, inputs) == before


def test_a_name_that_a_lora_has(method, clip, inputs):
    get_peft_model(clip, LoraConfig(target_modules=["q_proj"]))
    before = snapshot(clip, inputs)
    with pytest.raises(ValueError, match=r"'default': Linear '.*q_proj' has it"):
        get_peft_model(clip, settings(method)[0])
    assert snapshot(clip, inputs) == before


def test_loading_over_a_name_that_is_taken(method, clip, inputs, tmp_path):
    get_peft_model(clip, settings(method)[0]).save_pretrained(tmp_path)
    before = snapshot(clip, inputs)
    with pytest.raises(ValueError, match="holds an adapter with the name 'default'"):
        PeftModel.from_pretrained(clip, tmp_path)
    assert snapshot(clip, inputs) == before


@pytest.mark.parametrize("call", TAKEN)
def test_settings_that_do_not_fit_a_plain_model(call, method, clip, inputs):
    before = snapshot(clip, inputs)
    with pytest.raises(ValueError):
        TAKEN[call](clip, settings(method)[2])
    assert snapshot(clip, inputs) == before
    TAKEN[call](clip, settings(method)[0])  # which is still possible


def test_settings_that_do_not_fit_beside_an_adapter(method, clip, inputs):
    model = get_peft_model(clip, settings(method)[0])
    before = snapshot(clip, inputs)
    for attempt in (
        lambda config: model.add_adapter("other", config),
        lambda config: get_peft_model(clip, config, adapter_name="other"),
        lambda config: clip.add_adapter(config, "other"),
    ):
        with pytest.raises(ValueError):
            attempt(settings(method)[2])
        assert snapshot(clip, inputs) == before


def test_an_adapter_that_was_taken_out_leaves_its_name(method, clip, clip_folder, inputs):
    """The second adapter is what its own settings say, whatever the first was."""
    first, second, _ = settings(method)
    sizes = [parameter.shape for parameter in fresh(clip_folder, second)]
    model = get_peft_model(clip, first)
    model.add_adapter("kept", copy.deepcopy(first))
    model.set_adapter("kept")
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(second))
    model.set_adapter("default")
    assert [p.shape for p in model.parameters() if p.requires_grad] == sizes
    again = get_peft_model(model.unload(), copy.deepcopy(second))
    assert [p.shape for p in again.parameters() if p.requires_grad] == sizes


def fresh(folder, config):
    model = get_peft_model(CLIPModel.from_pretrained(folder), copy.deepcopy(config))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
