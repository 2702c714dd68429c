# ruff: noqa: RUF001 (letters that look like others are what is tried)
"""Names of tasks: whatever they are, their adapters train, are saved and come back, or the name is refused."""

import copy
import random

import pytest
import torch
from peft import get_peft_model

from mmap_peft import BottleneckAdapterConfig, LinearProbeConfig, MmAPConfig, MultiTaskClassifier, Task, lora_config
from mmap_peft.multitask.task import adapter_name
from tests.faults.names import NASTY, accepted, check


@pytest.mark.parametrize("config", [MmAPConfig(num_prompts=2), LinearProbeConfig()], ids=["mmap", "probe"])
def test_two_hundred_nasty_names(config, processor, tmp_path):
    assert len(set(NASTY)) >= 200
    names = accepted(NASTY)
    refused = set(NASTY) - set(names)
    assert {"global", "group_0", "mean", "", "!", "\u200b", "x" * 300} <= refused and len(refused) < 100
    for start in range(0, len(names), 10):
        check(names[start : start + 10], copy.deepcopy(config), random.Random(start), tmp_path / str(start))


@pytest.mark.parametrize("name", ["source", "export"])
def test_they_train_beside_one_another_in_groups(name, processor, tmp_path):
    check([name, "scale_text", "art", "clipart"], MmAPConfig(num_prompts=2), random.Random(1), tmp_path, groups=True)
    check([name, "lora_A", "art", "clipart"], lora_config(r=2), random.Random(1), tmp_path / "lora")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("Real World", "real_world"),
        ("--a__B 1!", "a_b_1"),
        ("夜の写真", "夜の写真"),
        ("Cafe\u0301 Crème", "café_crème"),
        ("Straße", "strasse"),
        ("День 2", "день_2"),
        ("ＡＢＣ", "abc"),
        ("a\u200bb\u202ec", "abc"),
        ("🙂 art 🙂", "art"),
        ("🙂", ""),
    ],
)
def test_the_name_of_an_adapter(name, adapter):
    assert adapter_name(name) == adapter
    assert adapter_name(adapter) == adapter


def test_a_name_that_is_too_long_for_a_folder():
    assert len(adapter_name("写" * 66).encode()) == 198
    for name in ("写" * 67, "x" * 201):
        with pytest.raises(ValueError, match="for `name` of a task: a folder of 201 bytes"):
            Task(name, ["x", "y"])


def test_one_adapter_of_two_tasks(clip, processor):
    with pytest.raises(ValueError, match="would both have the adapter 'café'"):
        MultiTaskClassifier(clip, processor, [Task(name, ["x", "y"]) for name in ("Café", "cafe\u0301")], MmAPConfig())


@pytest.mark.parametrize("config", [MmAPConfig(), BottleneckAdapterConfig(bottleneck_size=2)])
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained")
def test_tensors_names_are_refused_as_those_of_an_adapter_of_one_model(config, clip):
    own = {"mmap": ["source", "scale_text", "mmap_generators"], "bott": ["bottleneck_down", "bottleneck_up"]}
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    for name in [*own[config.peft_type.lower()[:4]], "weight", "bias", "encoder", "0", "fc2", "pop", ""]:
        with pytest.raises(ValueError, match="cannot name an adapter"):
            get_peft_model(clip, copy.deepcopy(config), adapter_name=name)
    assert list(state) == list(clip.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.state_dict().items())
    model = get_peft_model(clip, copy.deepcopy(config))
    with pytest.raises(ValueError, match="cannot name an adapter"):
        model.add_adapter("weight", copy.deepcopy(config))
    assert list(model.peft_config) == ["default"]
