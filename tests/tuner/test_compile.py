"""`torch.compile`: one graph, and no other one for another route."""

import functools

import pytest
import torch
from accelerate.utils import is_compiled_module
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from mmap_peft import MaPLeConfig, MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, TaskGrouping, use_routes

from ..conftest import load_clip, tiny_clip


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend():
    return CompileCounterWithBackend("aot_eager")


@pytest.fixture
def only_dynamo():
    """Runs the graphs as Dynamo found them, which is enough to count them."""
    return CompileCounterWithBackend("eager")


def gradients(model, call):
    model.zero_grad()
    found = call()
    found.square().sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm()


def model_with(*adapters, attention="sdpa", config=CONFIG):
    model = get_peft_model(tiny_clip(attention), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_requires_grad(list(adapters), True)
    return model.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_graph_for_all_routes_with_equal_gradients(attention, backend, inputs, mask):
    model = model_with("x", "y", attention=attention)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for routes in ([("x",), ("y",)], [("y",), ("x",)]):
        for rows in ([0, 1, 0], [1, 1, 0]):
            with use_routes(model, routes, text=rows, vision=rows[::-1]):
                found = gradients(model, lambda: compiled(**inputs, attention_mask=mask).logits_per_image)
                expected = gradients(model, lambda: model(**inputs, attention_mask=mask).logits_per_image)
            assert_close(found, expected)
            assert backend.frame_count == 1


@pytest.mark.parametrize("config", [CONFIG, MaPLeConfig(num_prompts=2, init_std=0.5)], ids=["mmap", "maple"])
def test_another_route_compiles_nothing(config, only_dynamo, inputs):
    model = model_with("x", "y", "z", config=config).eval()
    compiled = torch.compile(model, fullgraph=True, backend=only_dynamo)
    for route in (("x",), ("y",), ("z",), ("x",)):
        with use_routes(model, route), torch.no_grad():
            found, expected = compiled(**inputs), model(**inputs)
        torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=1e-5)
        assert only_dynamo.frame_count == 1


# Where a graph breaks, Dynamo asks for the gradient of what it hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_checkpointing_in_a_compiled_model(backend, inputs):
    model = model_with("x", "y")
    expected = gradients(model, lambda: model(**inputs).logits_per_image)
    clip = model.get_base_model()
    enable = getattr(clip, "activation_checkpointing_enable", None) or clip.gradient_checkpointing_enable
    enable()
    compiled = torch.compile(model, backend=backend)  # transformers' own hook on the embeddings breaks the graph
    assert_close(gradients(model, lambda: compiled(**inputs).logits_per_image), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_classifier_compiles_nothing_for_another_order_of_tasks(only_dynamo, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))
    compiled = torch.compile(classifier.train(), backend=only_dynamo)
    pixels = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    labels, graphs = torch.tensor([0, 1, 2, 1, 2, 0]), []
    for ids in ([0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]):
        batch = pixels, torch.tensor(ids), labels
        found = gradients(classifier, functools.partial(loss, compiled, *batch))
        assert_close(found, gradients(classifier, functools.partial(loss, classifier, *batch)))
        graphs.append(only_dynamo.frame_count)
    assert graphs[0] == graphs[1] > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_trainer_compiles_both_stages_for_the_same_prompts(clip_folder, processor, tasks, arguments, tmp_path):
    found = []
    for compiled in (False, True):
        clip = load_clip(clip_folder)
        classifier = MultiTaskClassifier(clip, processor, tasks, CONFIG)
        fields = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        args = arguments(output_dir=str(tmp_path / str(compiled)), save_strategy="no", max_steps=2, **fields)
        trainer = MultiTaskTrainer(model=classifier, args=args)
        trainer.train()
        assert is_compiled_module(trainer.model_wrapped) == compiled
        found.append([parameter for parameter in classifier.parameters() if parameter.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def loss(model, *batch):
    return model(*batch).loss
