"""Wrong values of settings: one sentence with the setting's name, and the place in it."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Lt
from peft import LoraConfig, get_peft_model

from mmap_peft import (
    CoOpConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    VPTConfig,
    ia3_config,
    lora_config,
)
from mmap_peft.checking import Count, Names, Pattern, checked, shortened


@pytest.mark.parametrize(
    ("value", "kind", "sentence"),
    [
        (True, Count, "Invalid value True for `x`: expected an integer of 1 or more."),
        (1.0, Count | None, "Invalid value 1.0 for `x`: expected an integer of 1 or more, or None."),
        (float("nan"), float, "Invalid value nan for `x`: expected a finite number."),
        (
            1,
            Annotated[float, Ge(0), Lt(1)],
            "Invalid value 1 for `x`: expected a finite number of 0 or more and below 1.",
        ),
        ("no", Literal["none", "all"], "Invalid value 'no' for `x`: expected one of 'none', 'all'."),
        (["fc1", 2], Pattern | Names | None, "Invalid value 2 for `x[1]`: expected a string."),
        (
            {"a": {"b": [1]}},
            dict[str, dict[str, str | list[str]]],
            "Invalid value 1 for `x['a']['b'][0]`: expected a string.",
        ),
        (
            "(",
            Pattern,
            "Invalid value '(' for `x`: it is no regular expression (missing ), unterminated subpattern at ",
        ),
    ],
)
def test_sentences(value, kind, sentence):
    with pytest.raises(ValueError) as error:
        checked(value, kind, "x")
    assert str(error.value).startswith(sentence)


def test_values_of_any_size_are_shortened():
    for value in (10**5000, "x" * 10**6, ["y" * 1000] * 1000, {str(number): "z" * 99 for number in range(99)}, "a\nb"):
        assert len(shortened(value)) <= 100 and "\n" not in shortened(value)


CHANGED = [
    (MmAPConfig, "num_prompts", "x"),
    (MmAPConfig, "source_shape", (2.0, 2)),
    (CoOpConfig, "init_ids", [1, 2, 3, 10**6]),
    (CoOpConfig, "num_prompts", 64),
    (VPTConfig, "target_modules", "["),
    (VPTConfig, "target_modules", "nothing"),
    (VPTConfig, "depth", True),
    (lora_config, "r", 0),
    (lora_config, "lora_dropout", 2),
    (lora_config, "target_modules", [1]),
    (ia3_config, "feedforward_modules", 5),
    (LinearProbeConfig, "inference_mode", "no"),
]


@pytest.mark.parametrize(("make", "name", "value"), CHANGED)
def test_settings_that_were_changed_are_checked_when_they_are_used(make, name, value, clip, processor, tasks):
    config = make()
    setattr(config, name, value)
    state = [(key, tensor.clone(), tensor.requires_grad) for key, tensor in clip.named_parameters()]
    with pytest.raises(ValueError, match=name):
        MultiTaskClassifier(clip, processor, tasks, config)
    if make in (MmAPConfig, CoOpConfig, VPTConfig):
        with pytest.raises(ValueError, match=name):
            get_peft_model(clip, config)
    now = list(clip.named_parameters())
    assert [(key, flag) for key, _, flag in state] == [(key, tensor.requires_grad) for key, tensor in now]
    assert all(before.equal(tensor) for (_, before, _), (_, tensor) in zip(state, now))
    MultiTaskClassifier(clip, processor, tasks, make())  # which is still possible


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"config": {"num_prompts": 4}}, "config"),
        ({"config": MmAPConfig}, "config"),
        ({"tasks": "art"}, "tasks"),
        ({"tasks": ["art"]}, r"tasks\[0\]"),
        ({"tasks": 5}, "tasks"),
        ({"processor": None}, "processor"),
        ({"model": "openai/clip"}, "model"),
        *(({"seed": seed}, "seed") for seed in (True, 1.5, "x", -1, 2**70)),
        *(({"text_chunk": chunk}, "text_chunk") for chunk in (True, 0, 1.5)),
    ],
)
def test_arguments_of_a_classifier(fields, name, clip, processor, tasks):
    with pytest.raises(ValueError, match=f"for `{name}`"):
        MultiTaskClassifier(**{"model": clip, "processor": processor, "tasks": tasks, **fields})


def test_layers_that_peft_cannot_change_leave_the_others_as_they_were(clip, processor, tasks):
    modules = [(name, type(module)) for name, module in clip.named_modules()]
    with pytest.raises(ValueError, match=r"LoraConfig does not fit the CLIPModel: .*target_modules="):
        MultiTaskClassifier(clip, processor, tasks, LoraConfig(target_modules=["q_proj", "post_layernorm"]))
    assert modules == [(name, type(module)) for name, module in clip.named_modules()]
    assert not hasattr(clip, "peft_config")
