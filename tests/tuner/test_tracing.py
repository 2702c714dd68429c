"""What traces a model with prompts may run it at another batch size."""

import pytest
import torch
from peft import get_peft_model
from torch.export import Dim

from mmap_peft import VPTConfig, use_routes

from ..conftest import tiny_clip
from .test_prompts_argument import CONFIGS as PROMPTS


CONFIGS = {**PROMPTS, "vpt, first layer": VPTConfig(num_prompts=3, init_std=0.5, depth=1)}
METHOD = pytest.mark.parametrize("name", CONFIGS)


class Features(torch.nn.Module):
    """Image and text features of a model as tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids):
        output = self.model(input_ids=input_ids, pixel_values=pixel_values)
        return output.image_embeds, output.text_embeds


def features(name, attention="sdpa"):
    torch.manual_seed(0)
    return Features(get_peft_model(tiny_clip(attention), CONFIGS[name])).eval()


def batches(name, inputs):
    """An example, and inputs of other batch sizes; class-specific contexts have as many texts as classes."""
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    texts = 3 if "class-specific" in name else 2
    yield pixels[:2], ids[:texts]
    for images in (1, 3, 5):
        yield pixels.repeat(2, 1, 1, 1)[:images], ids if texts == 3 else ids.repeat(2, 1)[: 6 - images]


@METHOD
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace(name, inputs):
    module = features(name)
    example, *others = batches(name, inputs)
    with torch.no_grad():
        traced = torch.jit.trace(module, example, check_trace=False)
        for batch in others:
            torch.testing.assert_close(traced(*batch), module(*batch), atol=1e-5, rtol=1e-5)


@METHOD
def test_export_with_a_dynamic_batch(name, inputs):
    module = features(name)
    example, *others = batches(name, inputs)
    texts = {} if "class-specific" in name else {0: Dim("texts", min=1, max=64)}
    shapes = {"pixel_values": {0: Dim("images", min=1, max=64)}, "input_ids": texts}
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=shapes).module()
        for batch in others:
            torch.testing.assert_close(program(*batch), module(*batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["coop", "coop, in front", "coop, class-specific", "vpt", "ivlp", "maple"])
def test_one_graph(name, inputs):
    torch._dynamo.reset()
    module = features(name)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        batch = inputs["pixel_values"], inputs["input_ids"]
        torch.testing.assert_close(compiled(*batch), module(*batch), atol=1e-5, rtol=1e-5)
        with use_routes(module.model, ("default",), classes=[2, 0, 1]):
            torch.testing.assert_close(compiled(*batch), module(*batch), atol=1e-5, rtol=1e-5)
