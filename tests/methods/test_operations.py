"""Each operation of a PEFT model with each method that is no prompt: it works, or stops with one sentence."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    VPTConfig,
)

from ..conftest import load_clip


METHODS = {
    "bitfit": BitFitConfig,
    "full": FullFineTuningConfig,
    "adapter": lambda: BottleneckAdapterConfig(bottleneck_size=4, init_std=0.3),
}
WORKS = None
SENTENCES = {  # operation: what each method answers
    "rows": ("All rows of a batch use the same tuned", "A bottleneck adapter changes all rows"),
    "base rows": ("All rows of a batch use the same tuned", "A bottleneck adapter changes all rows"),
    "add_weighted_adapter": ("average the saved tensors", "write model.base_model.set_adapter"),
    "merge_adapter": ("write model.merge_and_unload", "has a nonlinearity"),
    "unmerge_adapter": ("write model.merge_and_unload", "has a nonlinearity"),
    "merge_and_unload": (WORKS, "has a nonlinearity"),
    "merge_and_unload of one": (WORKS, "has a nonlinearity"),
    "merge_and_unload of two": ("activate one of them", "has a nonlinearity"),
    "merge_and_unload of an unknown one": ("write one of x, y", "has a nonlinearity"),
    "set_adapter of several": ("activate one of them", WORKS),
    "set_adapter of an unknown one": ("Adapter z not found", "Adapter z not found"),
    "delete_adapter of an unknown one": ("Adapter z does not exist", "Adapter z does not exist"),
    "unload twice": (WORKS, WORKS),
    "disable_adapter twice": (WORKS, WORKS),
    "set_requires_grad": (WORKS, WORKS),
    "status": (WORKS, WORKS),
}


def disabled_twice(model):
    with model.disable_adapter(), model.disable_adapter():
        pass


def unloaded_twice(model):
    assert model.unload() is model.unload()


OPERATIONS = {
    "rows": lambda model, inputs: model(**inputs, adapter_names=["x", "y", "x"]),
    "base rows": lambda model, inputs: model(**inputs, adapter_names=["__base__"] * 3),
    "add_weighted_adapter": lambda model, _: model.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mean"),
    "merge_adapter": lambda model, _: model.merge_adapter(),
    "unmerge_adapter": lambda model, _: model.unmerge_adapter(),
    "merge_and_unload": lambda model, _: model.merge_and_unload(),
    "merge_and_unload of one": lambda model, _: model.merge_and_unload(adapter_names=["y"], safe_merge=True),
    "merge_and_unload of two": lambda model, _: model.merge_and_unload(adapter_names=["x", "y"]),
    "merge_and_unload of an unknown one": lambda model, _: model.merge_and_unload(adapter_names=["z"]),
    "set_adapter of several": lambda model, _: model.base_model.set_adapter(["x", "y"]),
    "set_adapter of an unknown one": lambda model, _: model.set_adapter("z"),
    "delete_adapter of an unknown one": lambda model, _: model.delete_adapter("z"),
    "unload twice": lambda model, _: unloaded_twice(model),
    "disable_adapter twice": lambda model, _: disabled_twice(model),
    "set_requires_grad": lambda model, _: model.set_requires_grad("x", requires_grad=False),
    "status": lambda model, _: model.get_model_status(),
}


def disturb(model):
    """Let every adapter do something of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".x." in name or ".y." in name or ".global." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def model(method, clip):
    """A model with the adapters x and y, of which x is active."""
    model = get_peft_model(clip, METHODS[method](), adapter_name="x")
    model.add_adapter("y", METHODS[method]())
    disturb(model)
    return model.eval()


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits_per_image


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_works_or_stops_with_a_sentence(operation, method, model, inputs):
    expected = SENTENCES[operation][method == "adapter"]
    if expected is WORKS:
        OPERATIONS[operation](model, inputs)
        return
    before = logits(model, inputs)
    with pytest.raises((ValueError, NotImplementedError), match=expected):
        OPERATIONS[operation](model, inputs)
    assert torch.equal(logits(model, inputs), before)
    assert model.active_adapters == ["x"] and sorted(model.peft_config) == ["x", "y"]


@pytest.mark.parametrize("config_class", [MmAPConfig, CoOpConfig, VPTConfig, IVLPConfig, MaPLeConfig])
def test_rows_of_prompts_may_be_those_of_the_base_if_prompts_leave_the_sequence(config_class, clip, inputs):
    model = get_peft_model(clip, config_class(), adapter_name="x").eval()
    with torch.no_grad():
        base = model(**inputs, adapter_names=["__base__"] * 3).logits_per_image
        with model.disable_adapter():
            torch.testing.assert_close(base, logits(model, inputs), atol=1e-5, rtol=1e-5)
        if config_class is MmAPConfig:
            mixed = model(**inputs, adapter_names=["x", "__base__", "x"]).logits_per_image
            torch.testing.assert_close(mixed[1, 1], base[1, 1], atol=1e-5, rtol=1e-5)
        else:
            with pytest.raises(ValueError, match="number"):
                model(**inputs, adapter_names=["x", "__base__", "x"])


@pytest.mark.parametrize("method", ["bitfit", "full"], indirect=True)
def test_a_merge_takes_the_adapter_that_is_named(method, model, inputs):
    model.set_adapter("y")
    expected = logits(model, inputs)
    model.set_adapter("x")
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["y"]), inputs), expected)


@pytest.mark.parametrize("method", ["bitfit", "full"], indirect=True)
def test_a_safe_merge_refuses_what_is_not_finite(method, model, inputs):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".y." in name).fill_(float("nan"))
    before = logits(model, inputs)
    with pytest.raises(ValueError, match="Adapter 'y' holds numbers that are not finite"):
        model.merge_and_unload(adapter_names=["y"], safe_merge=True)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.filterwarnings("ignore:Adapter x was active which is now deleted")
def test_a_deleted_adapter_leaves_nothing(method, model, clip_folder, inputs):
    model.set_adapter("y")
    expected = logits(model, inputs)
    model.set_adapter("x")
    model.delete_adapter("x")
    assert torch.equal(logits(model, inputs), expected)
    assert not [name for name, _ in model.named_parameters() if ".x." in name]
    model.delete_adapter("y")
    clip, plain = model.base_model.model, load_clip(clip_folder)
    assert torch.equal(logits(clip, inputs), logits(plain, inputs))
    assert sum(p.numel() for p in clip.parameters()) == sum(p.numel() for p in plain.parameters())
    if hasattr(clip, "tuned"):
        assert not clip.tuned.places and not clip.tuned.tuned_parameters


def test_a_narrower_adapter_keeps_only_its_own_places(clip, inputs):
    model = get_peft_model(clip, FullFineTuningConfig(), adapter_name="x")
    model.add_adapter("y", FullFineTuningConfig(parameters=r".*\.fc1\.bias"))
    model.set_adapter("y")
    model.delete_adapter("x")
    assert all(name.endswith("fc1.bias") for name in clip.tuned.places) and len(clip.tuned.places) == 5


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_lora_stands_beside(method, clip, inputs):
    plain = logits(clip, inputs)
    clip.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "low_rank")
    low_rank = logits(clip, inputs)
    clip.add_adapter(METHODS[method](), "x")
    disturb(clip)
    alone = logits(clip, inputs)
    clip.set_adapter(["low_rank", "x"])
    both = logits(clip, inputs)
    clip.set_adapter("low_rank")
    assert torch.equal(logits(clip, inputs), low_rank)
    results = [plain, low_rank, alone, both]
    assert not any(torch.equal(a, b) for number, a in enumerate(results) for b in results[:number])
    clip.disable_adapters()
    assert torch.equal(logits(clip, inputs), plain)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("config_class", [BitFitConfig, FullFineTuningConfig])
def test_parameters_of_other_adapters_are_not_tuned(config_class, clip, clip_folder):
    clip.add_adapter(LoraConfig(target_modules=["q_proj"], lora_bias=True), "low_rank")
    clip.add_adapter(BottleneckAdapterConfig(), "bottleneck")
    clip.add_adapter(MmAPConfig(), "prompts")
    clip.add_adapter(config_class(), "x")
    plain = get_peft_model(load_clip(clip_folder), config_class(), adapter_name="x")
    beside, alone = (
        [name.replace("base_layer/", "") for name in model.tuned.tuned_parameters["x"]]
        for model in (clip, plain.get_base_model())
    )
    assert sorted(beside) == sorted(alone)


# ---- what others do with a model


def test_weights_that_wait_in_memory_are_fetched(method, clip, inputs):
    model = get_peft_model(clip, METHODS[method](), adapter_name="x").eval()
    disturb(model)
    tuned = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    assert not torch.equal(tuned, base)
    cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    torch.testing.assert_close(logits(model, inputs), tuned, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), base, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_sees_a_switch(clip, inputs):
    model = get_peft_model(clip, BitFitConfig(parameters=r"vision_model\..*\.bias"), adapter_name="x").eval()
    disturb(model)
    compiled = torch.compile(clip.vision_model, backend="eager", fullgraph=True)
    features = compiled(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(features, clip.vision_model(inputs["pixel_values"]).pooler_output)
    with model.disable_adapter():
        base = compiled(inputs["pixel_values"]).pooler_output
        torch.testing.assert_close(base, clip.vision_model(inputs["pixel_values"]).pooler_output)
    assert not torch.allclose(features, base, atol=1e-3)
