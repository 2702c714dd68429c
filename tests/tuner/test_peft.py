"""What a user of PEFT may expect of any adapter, for every prompt method."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from transformers import CLIPModel, pipeline

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    PromptSRCConfig,
    VPTConfig,
    use_routes,
)

from ..conftest import load_clip


MMAP = {"num_prompts": 4, "source_shape": (2, 4), "init_std": 0.5}
CONFIGS = {  # every prompt method, in each of its shapes
    "mmap": (MmAPConfig, MMAP),
    "mmap, first layer": (MmAPConfig, {**MMAP, "depth": 1}),
    "mmap, vision only": (MmAPConfig, {**MMAP, "exclude_modules": r".*text_model.*"}),
    "coop": (CoOpConfig, {"num_prompts": 2, "init_std": 0.5}),
    "coop, class-specific": (CoOpConfig, {"num_prompts": 2, "init_std": 0.5, "num_classes": 3}),
    "vpt, shallow": (VPTConfig, {"num_prompts": 3, "init_std": 0.5, "depth": 1}),
    "vpt, deep": (VPTConfig, {"num_prompts": 3, "init_std": 0.5}),
    "ivlp": (IVLPConfig, {"num_prompts": 1, "num_vision_prompts": 3, "vision_depth": 1, "init_std": 0.5}),
    "promptsrc": (PromptSRCConfig, {"num_prompts": 2, "depth": 2, "init_std": 0.5}),
    "mmrl tokens": (MMRLTokensConfig, {"num_prompts": 2, "token_size": 8, "first_layer": 1, "init_std": 0.5}),
    "maple": (MaPLeConfig, {"num_prompts": 2, "init_std": 0.5}),
}


@pytest.fixture(params=CONFIGS)
def make(request):
    """Makes the settings of a method."""
    config, fields = CONFIGS[request.param]
    return lambda **more: config(**{**fields, **more})


@pytest.fixture
def model(clip, make):
    return get_peft_model(clip, make()).eval()


@pytest.fixture
def three(clip, make):
    """A model with the adapters x, y and z, of which x is active."""
    model = get_peft_model(clip, make(), adapter_name="x")
    model.add_adapter("y", make())
    model.add_adapter("z", make())
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def logits(model, inputs):
    return model.eval()(**inputs).logits_per_image


def assert_same(found, expected):
    """To float32's last digits: where a file's tensors lie in memory decides which kernel multiplies them."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def routed(model, inputs, *route):
    with use_routes(model, route):
        return logits(model, inputs)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def count(model):
    """Tensors of one adapter."""
    return len(list(next(iter(model.get_base_model().mmap.mmap_generators.values())).parameters()))


# ---- files


def loaded_by_peft(folder, clip_folder):
    return PeftModel.from_pretrained(load_clip(clip_folder), folder)


def loaded_without_a_second_copy(folder, clip_folder):
    return PeftModel.from_pretrained(load_clip(clip_folder), folder, low_cpu_mem_usage=True)


def loaded_natively(folder, clip_folder):
    return CLIPModel.from_pretrained(folder)


def loaded_into_a_clip(folder, clip_folder):
    clip = load_clip(clip_folder)
    clip.load_adapter(folder)
    return clip


def loaded_automatically(folder, clip_folder):
    return AutoPeftModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "load",
    [loaded_by_peft, loaded_without_a_second_copy, loaded_natively, loaded_into_a_clip, loaded_automatically],
)
def test_loading_gives_the_same_prompts(load, model, saved, clip_folder, inputs):
    again = load(saved, clip_folder)
    assert_same(logits(again, inputs), logits(model, inputs))
    found = dict(getattr(again, "base_model", again).named_parameters())
    for name, parameter in model.base_model.named_parameters():
        if "mmap." in name:
            name = name if name in found else name.removeprefix("model.")
            assert torch.equal(found[name], parameter)


def test_a_file_holds_the_tensors_of_one_adapter(model, saved):
    with safe_open(f"{saved}/adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == count(model)


def test_a_config_survives_its_file(make, tmp_path):
    config = make(base_model_name_or_path="clip")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_a_second_adapter_is_loaded_beside_the_first(three, clip_folder, inputs, tmp_path):
    three.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load_clip(clip_folder), str(tmp_path / "x"), adapter_name="x")
    model.load_adapter(str(tmp_path / "y"), adapter_name="y")
    assert model.active_adapter == "x"
    model.set_adapter("y")
    assert torch.equal(logits(model, inputs), routed(three, inputs, "y"))
    assert not torch.equal(logits(model, inputs), routed(three, inputs, "x"))


def test_selected_adapters_are_saved_alone(three, tmp_path):
    three.save_pretrained(tmp_path, selected_adapters=["y"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["y"]


@pytest.mark.parametrize("trainable", [True, False])
def test_is_trainable(trainable, saved, clip_folder):
    clip = load_clip(clip_folder)
    model = PeftModel.from_pretrained(clip, saved, is_trainable=trainable)
    assert len(trained(model)) == (count(model) if trainable else 0)


def test_inference_mode_trains_nothing(clip, make):
    assert not trained(get_peft_model(clip, make(inference_mode=True)))


def test_state_dict_of_one_adapter(three, clip_folder, make, inputs):
    state = get_peft_model_state_dict(three, adapter_name="z")
    other = get_peft_model(load_clip(clip_folder), make(), adapter_name="z")
    assert not set_peft_model_state_dict(other, state, adapter_name="z").unexpected_keys
    assert torch.equal(logits(other, inputs), routed(three, inputs, "z"))
    with pytest.raises(KeyError):
        get_peft_model_state_dict(three, adapter_name="unknown")


def test_state_dict_of_the_whole_model(three, make, clip_folder, inputs):
    file = io.BytesIO()
    torch.save(three.state_dict(), file)
    other = get_peft_model(load_clip(clip_folder), make(), adapter_name="x")
    other.add_adapter("y", make())
    other.add_adapter("z", make())
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name in ("x", "y", "z"):
        assert torch.equal(routed(other, inputs, name), routed(three, inputs, name))


def test_modules_to_save_train_travel_and_stay(clip, make, clip_folder, inputs, tmp_path):
    model = get_peft_model(clip, make(modules_to_save=["visual_projection"]))
    assert "base_model.model.visual_projection.modules_to_save.default.weight" in trained(model)
    with torch.no_grad():
        model.get_base_model().visual_projection.weight.add_(1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_clip(clip_folder), str(tmp_path))
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    base = load_clip(clip_folder)
    with torch.no_grad():
        base.visual_projection.weight.add_(1)
    assert torch.equal(logits(again.unload(), inputs), logits(base, inputs))  # PEFT leaves them in the base


@pytest.mark.parametrize("name", ["mlp", "self_attn", "embeddings", "position_embedding"])
def test_trained_copies_of_any_module_stay_on_unloading(name, clip, make, inputs):
    model = get_peft_model(clip, make(modules_to_save=[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".modules_to_save." in key:
                parameter.add_(0.1)
    with use_routes(model, model.active_adapters):
        model(**inputs)
    expected = CLIPModel(clip.config).state_dict().keys()
    trained_copies = {
        key.replace("modules_to_save.default.", ""): value.clone()
        for key, value in clip.state_dict().items()
        if ".modules_to_save." in key
    }
    base = model.unload()
    assert base.state_dict().keys() == expected and trained_copies
    assert all(torch.equal(base.state_dict()[key], value) for key, value in trained_copies.items())
    assert type(base.text_model.encoder.layers[0].self_attn.config) is type(base.config.text_config)


# ---- switching


def test_switching_adapters(three, inputs):
    for name in ("y", "x", "z"):
        three.set_adapter(name)
        assert torch.equal(logits(three, inputs), routed(three, inputs, name))
        assert len(trained(three)) == count(three)
        assert all(f".{name}." in parameter for parameter in trained(three))
    three.set_adapter("x", inference_mode=True)
    assert not trained(three)


@pytest.mark.parametrize("name", ["x", "y", "z"])
def test_one_of_several_active_adapters_is_deleted(name, three, inputs):
    three.base_model.set_adapter(["x", "y", "z"])
    three.delete_adapter(name)
    rest = [other for other in ("x", "y", "z") if other != name]
    assert three.active_adapters == list(three.peft_config) == rest
    assert torch.equal(logits(three, inputs), routed(three, inputs, *rest))
    assert not [key for key in three.state_dict() if f".{name}." in key]
    assert three.get_model_status().available_adapters == rest


def test_an_inactive_adapter_is_deleted(three, inputs):
    before = logits(three, inputs)
    three.delete_adapter("z")
    assert three.active_adapters == ["x"]
    assert torch.equal(logits(three, inputs), before)
    with pytest.raises(ValueError, match="does not exist"):
        three.delete_adapter("z")


def test_the_last_adapter_is_deleted(model, clip_folder, inputs):
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model, inputs), logits(load_clip(clip_folder), inputs))


def test_a_deleted_name_can_be_used_again(three, make, inputs):
    three.delete_adapter("y")
    three.add_adapter("y", make())
    assert not torch.equal(routed(three, inputs, "y"), routed(three, inputs, "x"))


def test_disabling_gives_the_base_to_the_bit(model, clip_folder, inputs):
    base = load_clip(clip_folder)
    prompted = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base, inputs))
        assert not model.get_model_status().enabled
    assert torch.equal(logits(model, inputs), prompted)
    assert not torch.equal(prompted, logits(base, inputs))


def test_unloading_gives_the_base_to_the_bit_and_it_can_be_wrapped_again(model, make, clip_folder, inputs):
    model(**inputs, output_hidden_states=True)
    base, untouched = model.unload(), load_clip(clip_folder)
    assert torch.equal(logits(base, inputs), logits(untouched, inputs))
    assert base.state_dict().keys() == untouched.state_dict().keys()
    assert not any("forward" in vars(module) for module in base.modules())
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert type(base.text_model.encoder.layers[0].self_attn.config) is type(base.config.text_config)
    again = get_peft_model(base, make())
    assert not torch.equal(logits(again, inputs), logits(untouched, inputs))


def test_adapter_names_give_each_row_its_own(three, inputs):
    rides = three.peft_config["x"].stays_in_sequence
    names = ["y", "z" if rides else "__base__", "x"]
    mixed = three(**inputs, adapter_names=names)
    for row, name in enumerate(names):
        with use_routes(three, () if name == "__base__" else (name,)):
            alone = three(**inputs)
        torch.testing.assert_close(mixed.image_embeds[row], alone.image_embeds[row], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mixed.text_embeds[row], alone.text_embeds[row], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="`adapter_names` is empty"):
        three(**inputs, adapter_names=[])
    if rides:
        with pytest.raises(ValueError, match=r"routes differ in length|have different numbers of prompts"):
            three(**inputs, adapter_names=["y", "__base__", "x"])


# ---- status


def test_status(three):
    status = three.get_model_status()
    one = three.get_nb_trainable_parameters()[0]
    assert status.active_adapters == ["x"]
    assert status.available_adapters == ["x", "y", "z"]
    assert status.requires_grad == {"x": True, "y": False, "z": False}
    assert status.devices == {name: ["cpu"] for name in ("x", "y", "z")}
    assert status.trainable_params == one == sum(p.numel() for p in three.parameters() if p.requires_grad)
    assert [layer.available_adapters for layer in three.get_layer_status()] == [["x", "y", "z"]]


def test_adding_an_adapter_leaves_the_flags_of_others(three):
    assert len(trained(three)) == count(three)
    assert all(".x." in name for name in trained(three))


# ---- without PeftModel


def test_injecting_into_a_model_without_wrapping_it(clip, make, inputs):
    base = logits(clip, inputs)
    injected = inject_adapter_in_model(make(), clip, "one")
    assert injected is clip
    assert not torch.equal(logits(clip, inputs), base)
    assert torch.equal(routed(clip, inputs), base)


def test_injecting_without_memory_for_the_prompts(clip, make):
    inject_adapter_in_model(make(), clip, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in clip.mmap.parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # as for two LoRA adapters
def test_a_lora_beside_the_prompts(clip, make, clip_folder, inputs, tmp_path):
    """Through transformers' own methods, in any combination."""
    base = logits(clip, inputs)
    clip.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "low_rank")
    low_rank = logits(clip, inputs)
    clip.add_adapter(make(), "prompts")
    prompts = logits(clip, inputs)
    clip.set_adapter(["low_rank", "prompts"])
    both = logits(clip, inputs)
    for one, other in ((base, low_rank), (base, prompts), (low_rank, prompts), (low_rank, both), (prompts, both)):
        assert not torch.equal(one, other)

    clip.set_adapter("low_rank")
    assert torch.equal(logits(clip, inputs), low_rank)
    clip.disable_adapters()
    assert torch.equal(logits(clip, inputs), base)
    clip.enable_adapters()
    clip.set_adapter("prompts")
    clip.save_pretrained(tmp_path)
    assert_same(logits(CLIPModel.from_pretrained(tmp_path), inputs), prompts)
    clip.set_adapter(["low_rank", "prompts"])
    clip.delete_adapter("prompts")
    assert torch.equal(logits(clip, inputs), low_rank)


def test_transformers_pipeline_pads_labels_and_scores_as_without_padding(saved, clip_folder, processor):
    from mmap_peft.data.pictograms import draw

    model = CLIPModel.from_pretrained(saved).eval()
    labels = ["sun", "a very small chess knight", "umbrella with stripes"]
    image = draw("print", "sun", 0)
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    found = {row["label"]: row["score"] for row in classify(image, candidate_labels=labels)}
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    alone = []
    for number, label in enumerate(labels):
        text = processor.tokenizer(f"This is a photo of {label}.", return_tensors="pt")
        with use_routes(model, tuple(model.active_adapters()), classes=[number]):
            alone.append(model(pixel_values=pixels, **text))
    expected = torch.cat([output.logits_per_image[0] for output in alone]).softmax(-1)
    torch.testing.assert_close(torch.tensor([found[label] for label in labels]), expected, atol=1e-5, rtol=1e-4)


# ---- copies and types


def test_a_copy_is_independent(model, inputs):
    before = logits(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, inputs), before)
    with torch.no_grad():
        for parameter in other.get_base_model().mmap.parameters():
            parameter.add_(1)
    assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(logits(other, inputs), before)


@pytest.mark.parametrize("wrapped", [True, False])
def test_pickle(wrapped, three, inputs):
    model = three if wrapped else three.get_base_model()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert torch.equal(routed(again, inputs, "z", "y"), routed(model, inputs, "z", "y"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_half_precision_base(autocast, dtype, clip, make, inputs):
    model = get_peft_model(clip.to(dtype), make(), autocast_adapter_dtype=autocast)
    prompts = {parameter.dtype for parameter in model.get_base_model().mmap.parameters()}
    assert prompts == {torch.float32 if autocast else dtype}
    found = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits_per_image
    assert found.dtype == dtype
    found.float().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_casting_a_wrapped_model_casts_the_prompts(model, inputs):
    model.to(torch.bfloat16)
    found = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)})
    assert found.logits_per_image.dtype == torch.bfloat16


def test_a_model_prepared_for_low_bit_training_trains_the_prompts(clip, make, inputs):
    model = get_peft_model(prepare_model_for_kbit_training(clip), make()).train()
    model(**inputs).logits_per_image.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert len(trained(model)) == count(model)


# ---- what cannot be


def test_merging_stops_with_a_sentence(model):
    for attempt in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match="cannot be merged into the base; keep the adapter"):
            attempt()


def test_weighted_sums_stop_with_a_sentence(three):
    with pytest.raises(NotImplementedError, match=r"to use several adapters at once, write use_routes"):
        three.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mean")


def test_mixed_models_stop_with_a_sentence(clip, make):
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        get_peft_model(clip, make(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        get_peft_model(clip, make()).add_adapter("low_rank", LoraConfig(target_modules=["q_proj"]))


def test_hotswapping_stops_with_a_sentence(model, saved, clip):
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, saved, "default", torch_device="cpu")
