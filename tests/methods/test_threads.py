"""Threads that predict with one model of a method that is no prompt get the answers of one thread."""

import threading

import pytest
import torch
from peft import get_peft_model

from mmap_peft import CLIPAdapterConfig, MmAPConfig, MultiTaskClassifier, lora_config
from mmap_peft.data.pictograms import draw

from .test_operations import METHODS, disturb, logits


def in_threads(predict, threads=4, rounds=50):
    """What `predict(number)` says in many threads at once, and in one."""
    expected = [predict(number) for number in range(threads)]
    answers, errors, start = [[] for _ in range(threads)], [], threading.Barrier(threads)

    def work(number):
        try:
            start.wait()
            answers[number] = [predict(number) for _ in range(rounds)]
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    return expected, answers


THREADED = {**METHODS, "lora": lora_config}


@pytest.mark.parametrize("name", THREADED)
def test_threads_share_a_peft_model(name, clip, inputs):
    model = get_peft_model(clip, THREADED[name](), adapter_name="x").eval()
    disturb(model)
    rows = [torch.arange(1 + number % 3) for number in range(4)]  # batches of different lengths
    expected, answers = in_threads(
        lambda number: logits(model, {key: value[rows[number]] for key, value in inputs.items()})
    )
    for one, many in zip(expected, answers):
        assert len(many) == 50 and all(torch.equal(answer, one) for answer in many)


ON_FEATURES = {"clip-adapter": CLIPAdapterConfig, "mmap, probe": lambda: MmAPConfig(probe=True)}
CLASSIFIED = {**THREADED, **ON_FEATURES}


@pytest.mark.parametrize("name", CLASSIFIED)
def test_threads_share_a_classifier(name, clip, processor, tasks):
    classifier = MultiTaskClassifier(clip, processor, tasks, CLASSIFIED[name]()).eval()
    if name == "mmap, probe":
        classifier.separate_adapters()
    disturb(classifier)
    images = [draw("print", "sun", 0), draw("photo", "star", 1)]
    chosen = [("print", images), ("clipart", images[:1]), ("photo", images), ("photo", images[1:])]
    expected, answers = in_threads(lambda number: classifier.predict(chosen[number][1], chosen[number][0]))
    for one, many in zip(expected, answers):
        assert len(many) == 50
        for answer in many:
            torch.testing.assert_close(answer.probabilities, one.probabilities, atol=1e-6, rtol=1e-5)


class Watched(dict):
    """Attributes of a module that count how often one is written."""

    writes = 0

    def __setitem__(self, key, value):
        Watched.writes += 1
        super().__setitem__(key, value)

    def pop(self, key, *default):
        Watched.writes += key in self
        return super().pop(key, *default)


@pytest.mark.parametrize("name", ["bitfit", "full"])
def test_a_forward_pass_writes_no_attribute(name, clip, inputs):
    model = get_peft_model(clip, METHODS[name](), adapter_name="x").eval()
    model.add_adapter("y", type(METHODS[name]())(parameters=r".*\.fc1\.bias"))
    for adapter in ("x", "y"):
        model.set_adapter(adapter)
        for module, _ in clip.tuned.places.values():
            module.__dict__ = Watched(module.__dict__)
        Watched.writes = 0
        logits(model, inputs)
        assert Watched.writes == 0
    model.set_adapter("x")
    assert Watched.writes > 0
