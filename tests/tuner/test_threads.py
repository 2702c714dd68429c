"""Threads that share a model with prompts get the answers of one thread."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    VPTConfig,
    lora_config,
    use_routes,
)
from mmap_peft.data.pictograms import draw
from mmap_peft.tuner.model import PromptTuner

from ..conftest import tiny_clip
from ..methods.test_threads import in_threads


CONFIGS = {
    "mmap": MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5),
    "coop": CoOpConfig(num_prompts=2, init_std=0.5),
    "vpt": VPTConfig(num_prompts=3, init_std=0.5),
    "ivlp": IVLPConfig(num_prompts=2, init_std=0.5),
    "maple": MaPLeConfig(num_prompts=2, init_std=0.5),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    model = get_peft_model(tiny_clip(), CONFIGS[request.param], adapter_name="x")
    model.add_adapter("y", CONFIGS[request.param])
    return model.eval()


def logits(model, inputs, rows):
    with torch.no_grad():
        return model(**{name: tensor[:rows] for name, tensor in inputs.items()}).logits_per_image


def test_routes_of_a_thread_are_its_own(model, inputs):
    """Batches of 1 to 3 rows, with the active adapter, with a route, and with routes of rows."""

    def predict(number):
        rows = 1 + number % 3
        if number == 0:
            return logits(model, inputs, rows)
        if number == 1:
            with use_routes(model, ("y",)):
                return logits(model, inputs, rows)
        numbers = [row % 2 for row in range(rows)]
        with use_routes(model, [("x",), ("y",)], text=numbers, vision=numbers[::-1]):
            return logits(model, inputs, rows)

    expected, answers = in_threads(predict, rounds=25)
    assert not torch.equal(expected[0][:1, :1], expected[1][:1, :1])
    for one, many in zip(expected, answers):
        assert len(many) == 25 and all(torch.equal(answer, one) for answer in many)


def test_routes_reach_a_thread_of_the_same_task(model, inputs):
    async def routed():
        with use_routes(model, ("y",)):
            return await asyncio.to_thread(logits, model, inputs, 3)

    with use_routes(model, ("y",)):
        expected = logits(model, inputs, 3)
    assert torch.equal(asyncio.run(routed()), expected)


def test_routes_of_two_models_at_once(model, inputs):
    other = get_peft_model(tiny_clip(seed=1), CONFIGS["mmap"], adapter_name="x")
    other.add_adapter("y", CONFIGS["mmap"])
    with use_routes(model, ("y",)):
        expected = logits(model, inputs, 3)
    with use_routes(model, ("y",)), use_routes(other.eval(), ("y",)):
        with use_routes(model, ("x",)):
            assert not torch.equal(logits(model, inputs, 3), expected)
        assert torch.equal(logits(model, inputs, 3), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_and_an_exported_task(name, processor, tasks):
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, CONFIGS[name])
    classifier.separate_adapters()
    exported = classifier.eval().export("photo")
    images = [draw("print", "sun", 0), draw("photo", "star", 1), draw("photo", "sun", 2)]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def predict(number):
        if number == 0:
            return classifier.predict(images, task=["print", "photo", "clipart"]).probabilities
        if number == 1:
            return classifier.predict(images[0], task="clipart").probabilities
        if number == 2:
            return exported(pixels[1:])
        with classifier.zero_shot():
            return classifier.predict(images[:2], task="photo").probabilities

    expected, answers = in_threads(predict, rounds=25)
    for one, many in zip(expected, answers):
        assert len(many) == 25
        for answer in many:
            torch.testing.assert_close(answer, one, atol=1e-6, rtol=1e-5)


def test_a_classifier_in_training_mode_is_in_it_again_after_many_threads(processor, tasks):
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, CONFIGS["mmap"]).train()
    classifier.clip.vision_model.eval()
    modes = [module.training for module in classifier.modules()]
    image = draw("print", "sun", 0)
    in_threads(lambda number: classifier.predict(image, task="print").probabilities, rounds=10)
    assert [module.training for module in classifier.modules()] == modes


@pytest.mark.parametrize("config", [lora_config(init_lora_weights=False), BottleneckAdapterConfig(), BitFitConfig()])
def test_zero_shot_blocks_of_two_threads_overlap(config, processor, tasks):
    """The second goes on when the first has ended, and afterwards the same adapters train as before."""
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks, config)
    with torch.no_grad():
        for parameter in classifier.adapter_parameters("global").values():
            parameter.add_(0.1)

    def answers():
        return classifier.predict(draw("print", "sun", 0), task="print").probabilities

    before, training = answers(), classifier.training_adapters
    first, second = classifier.zero_shot(), classifier.zero_shot()
    with ThreadPoolExecutor(1) as another, ThreadPoolExecutor(1) as one:
        one.submit(first.__enter__).result()
        another.submit(second.__enter__).result()
        expected = one.submit(answers).result()
        one.submit(first.__exit__, None, None, None).result()
        assert torch.equal(another.submit(answers).result(), expected)
        another.submit(second.__exit__, None, None, None).result()
    assert torch.equal(answers(), before) and not torch.allclose(before, expected, atol=1e-4)
    assert classifier.training_adapters == training == ["global"]


def test_answers_while_a_task_is_added(processor, tasks, monkeypatch):
    """At each step of adding an adapter, another thread gets the answers of before."""
    classifier = MultiTaskClassifier(tiny_clip(), processor, tasks[:2], CONFIGS["mmap"])
    image, found = draw("print", "sun", 0), []
    expected = classifier.predict(image, task="print").probabilities
    with ThreadPoolExecutor(1) as pool:

        def asking(function):
            def wrapper(*args, **kwargs):
                for step in (None, function):
                    result = None if step is None else step(*args, **kwargs)
                    found.append(pool.submit(classifier.predict, image, task="print").result().probabilities)
                return result

            return wrapper

        for name in ("inject_adapter", "_create_and_replace", "set_adapter"):
            monkeypatch.setattr(PromptTuner, name, asking(getattr(PromptTuner, name)))
        classifier.add_task(tasks[2])
    assert len(found) > 4 and all(torch.equal(each[:, :3], expected[:, :3]) for each in found)
