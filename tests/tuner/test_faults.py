"""What one adapter, block or thread does leaves the answers of others alone."""

import asyncio

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    TaskGrouping,
    VPTConfig,
    use_routes,
)
from mmap_peft.data.pictograms import draw

from ..conftest import tiny_clip


MMAP = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
TWO_KINDS = {
    "vpt and longer vpt": (VPTConfig(num_prompts=2, init_std=0.5), VPTConfig(num_prompts=3, init_std=0.5)),
    "deep and shallow": (VPTConfig(num_prompts=2, init_std=0.5), VPTConfig(num_prompts=2, init_std=0.5, depth=1)),
    "positions": (CoOpConfig(num_prompts=2, init_std=0.5), CoOpConfig(num_prompts=2, init_std=0.5, position="front")),
    "classes": (CoOpConfig(num_prompts=2, init_std=0.5), CoOpConfig(num_prompts=2, init_std=0.5, num_classes=3)),
}


def wrapped(config, other=None, clip=None):
    clip = clip or tiny_clip()
    torch.manual_seed(0)
    model = get_peft_model(clip, config, adapter_name="x")
    if other is not None:
        model.add_adapter("y", other)
    return model.eval()


@pytest.mark.parametrize("kinds", TWO_KINDS)
def test_a_compiled_model_uses_one_of_two_adapters_that_cannot_be_joined(kinds, inputs):
    torch._dynamo.reset()
    model = wrapped(*TWO_KINDS[kinds])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for route in ("x", "y", "x"):
        with use_routes(model, (route,)), torch.no_grad():
            expected, actual = model(**inputs).logits_per_image, compiled(**inputs).logits_per_image
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_blocks_of_two_asyncio_tasks_leave_nothing_behind_in_a_compiled_model(inputs):
    torch._dynamo.reset()
    model = wrapped(MMAP, MMAP)
    compiled = torch.compile(model, backend="eager")

    async def block(route, entered, other_left):
        with use_routes(model, (route,)):
            entered.set()
            await other_left.wait()

    async def interleaved():
        entered, left, first_left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(block("y", entered, left))
        await entered.wait()
        second_entered = asyncio.Event()
        second = asyncio.create_task(block("x", second_entered, first_left))
        await second_entered.wait()
        left.set()
        await first
        first_left.set()
        await second

    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        asyncio.run(interleaved())
        torch.testing.assert_close(compiled(**inputs).logits_per_image, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("config", [MMAP, VPTConfig(num_prompts=3), IVLPConfig(num_prompts=2), MaPLeConfig()])
def test_hidden_states_hold_all_tokens_and_nothing_else(config, pooled, inputs):
    model = wrapped(config)
    vision = model.get_base_model().vision_model
    arguments = {"pixel_values": inputs["pixel_values"], "output_hidden_states": True}
    with torch.no_grad():
        expected = vision(**arguments).hidden_states
        assert {state.shape[1] for state in expected} == {10}
        with use_routes(model, ("x",), pooled=pooled):
            answers = vision(**arguments).hidden_states, vision(**arguments, return_dict=False)[2]
    for states in answers:
        for state, other in zip(states, expected, strict=True):
            torch.testing.assert_close(state, other[:, : 1 if pooled and state is states[-1] else None])


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@pytest.mark.parametrize("name", ["mmap", "coop", "vpt", "maple"])
def test_prompts_for_a_clip_whose_text_tower_is_offloaded(name, inputs, tmp_path):
    config = {
        "mmap": MMAP,
        "coop": CoOpConfig(num_prompts=2, init_ids=[5, 6]),
        "vpt": VPTConfig(),
        "maple": MaPLeConfig(num_prompts=2),
    }
    expected = wrapped(config[name])(**inputs).logits_per_image
    clip = tiny_clip()
    places = {"text_model": "disk", "vision_model": "disk", "text_projection": "cpu", "visual_projection": "cpu"}
    dispatch_model(clip, {**places, "logit_scale": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    with torch.no_grad():
        actual = wrapped(config[name], clip=clip)(**inputs).logits_per_image
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [[0, 1, 3], [-1, 0, 1]])
def test_a_class_without_a_context(classes, inputs):
    model = wrapped(CoOpConfig(num_prompts=2, num_classes=3))
    with pytest.raises(ValueError, match="class"), use_routes(model, ("x",), classes=classes):
        model(**inputs)


def test_text_features_of_another_autocast_dtype_are_not_taken(processor, tasks):
    def predict(classifier, dtype):
        with torch.autocast("cpu", dtype=dtype):
            return classifier.predict(draw("photo", "star", 1), task="photo").probabilities

    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, MMAP)
    expected = predict(classifier, torch.float16)
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, MMAP)
    predict(classifier, torch.bfloat16)
    assert torch.equal(predict(classifier, torch.float16), expected)


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0]])
def test_a_number_of_no_task(ids, processor, tasks):
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, MMAP)
    with pytest.raises(ValueError, match="task_ids"):
        classifier(torch.zeros(2, 3, 48, 48), torch.tensor(ids))


def test_no_images(processor, tasks):
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, MMAP)
    found = classifier.predict([], task="photo")
    assert found.labels == [] and found.probabilities.shape == (0, 4)


def test_target_modules_of_the_other_tower():
    clip = tiny_clip()
    with pytest.raises(
        ValueError, match="matches no layer of the text tower from layer 0 on, which CoOpConfig puts prompts into"
    ):
        get_peft_model(clip, CoOpConfig(num_prompts=2, target_modules=r".*vision_model.*layers\.\d+"))
    assert not hasattr(clip, "mmap")


def test_a_grouping_without_room_for_its_prompts_changes_nothing(processor, tasks):
    clip = tiny_clip()
    half = clip.config.text_config.max_position_embeddings // 2
    classifier = MultiTaskClassifier(clip, processor, tasks, CoOpConfig(num_prompts=half))
    before = [tensor.clone() for tensor in classifier.adapter_parameters("global").values()]
    with pytest.raises(ValueError, match="positions; write a shorter"):
        classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))
    assert classifier.adapters == ["global"] and set(classifier.routes.values()) == {("global",)}
    assert all(map(torch.equal, classifier.adapter_parameters("global").values(), before))
