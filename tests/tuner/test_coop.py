"""Where the class name stands among CoOp's context, and contexts of single classes: put together by hand."""

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from mmap_peft import CoOpConfig, use_routes

from ..conftest import tiny_clip


NAMES = ["sun", "chess knight", "snowflake on a wall"]


def features(clip, embeddings, ends):
    """The text tower from its word embeddings on."""
    tower = clip.text_model
    hidden = embeddings + tower.embeddings.position_embedding.weight[: embeddings.shape[1]]
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None, is_causal=True)
    pooled = tower.final_layer_norm(hidden)[torch.arange(len(ends)), ends]
    return F.normalize(clip.text_projection(pooled), dim=-1)


@pytest.mark.parametrize("contexts", [None, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("position", ["front", "middle", "end"])
def test_values_and_gradients(position, count, contexts, processor, inputs):
    tokenizer = processor.tokenizer
    words = " ".join(["X"] * count)
    ids = tokenizer([f"{words} {name}." for name in NAMES], return_tensors="pt", padding=True)["input_ids"]
    config = CoOpConfig(num_prompts=count, position=position, num_classes=contexts, init_std=0.5)
    model = get_peft_model(tiny_clip(), config).eval()
    context = model.get_base_model().mmap.mmap_generators["default"].text_prompts
    found = model(input_ids=ids, pixel_values=inputs["pixel_values"]).text_embeds

    clip = tiny_clip()
    table, rows, ends = clip.text_model.embeddings.token_embedding.weight, [], []
    for number, name in enumerate(NAMES):
        own = context if contexts is None else context[number]
        name_rows = table[tokenizer(name, add_special_tokens=False)["input_ids"]]
        half = count // 2
        middle = {
            "end": [own, name_rows],
            "front": [name_rows, own],
            "middle": [own[:half], name_rows, own[half:]],
        }[position]
        first, stop = ids[number, :1], tokenizer(".", add_special_tokens=False)["input_ids"]
        row = torch.cat([table[first], *middle, table[stop], table[[tokenizer.eos_token_id]]])
        ends.append(len(row) - 1)
        rows.append(torch.cat([row, table[ids[number, len(row) :]]]))
    expected = features(clip, torch.stack(rows), torch.tensor(ends))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (one,), (other,) = (torch.autograd.grad((value * weights).sum(), context) for value in (found, expected))
    assert (one - other).norm() <= 1e-4 * other.norm()


def test_rows_may_be_of_any_class(inputs):
    model = get_peft_model(tiny_clip(), CoOpConfig(num_prompts=1, num_classes=3, init_std=0.5)).eval()
    ids = inputs["input_ids"]
    with torch.no_grad(), use_routes(model, ("default",), classes=[2, 0, 0]):
        found = model(**inputs).text_embeds
    for row, label in enumerate([2, 0, 0]):
        with torch.no_grad(), use_routes(model, ("default",), classes=[label] * 3):
            expected = model(input_ids=ids, pixel_values=inputs["pixel_values"]).text_embeds
        torch.testing.assert_close(found[row], expected[row], atol=1e-6, rtol=1e-5)
    three = use_routes(model, ("default",), classes=[0, 1, 2])
    with pytest.raises(ValueError, match="The text batch has 2 rows for 3 class-specific contexts"), three:
        model(input_ids=ids[:2], pixel_values=inputs["pixel_values"])


def test_texts_need_a_word_for_each_prompt(inputs):
    model = get_peft_model(tiny_clip(), CoOpConfig(num_prompts=12))
    with pytest.raises(ValueError, match="12 prompts take the places of as many after the first; write a word"):
        model(**inputs)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depth": 2}, "depth=2 is not CoOp"),
        ({"position": "left"}, "'left' for `position`: expected one of 'end', 'middle', 'front'"),
        ({"num_classes": 0}, "0 for `num_classes`: expected an integer from 1"),
        ({"init_ids": [1, 2]}, "are 2 words for 4 prompts"),
    ],
)
def test_settings_that_cannot_be(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        CoOpConfig(**fields)
