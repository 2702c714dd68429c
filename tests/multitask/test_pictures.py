"""Images that are transferred as bytes are those that the processor makes, to the bit."""

import functools

import pytest
import torch
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer
from mmap_peft.multitask.images import TaskImages, collate
from mmap_peft.multitask.pictures import Pictures, model_inputs
from mmap_peft.tuner import fingerprint
from mmap_peft.tuner.devices import on_device
from mmap_peft.tuner.fingerprint import Fingerprint, compared_by_versions


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(CLIPImageProcessorPil, size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        SiglipImageProcessorPil,
        functools.partial(CLIPImageProcessorPil, size={"shortest_edge": 20}, crop_size={"height": 19, "width": 17}),
        functools.partial(CLIPImageProcessorPil, do_normalize=False),
    ],
    ids=["clip", "siglip", "a size that 8 does not divide", "no normalization"],
)
def test_a_batch_of_bytes_is_one_of_the_processor_to_the_bit(make, tasks):
    images = TaskImages(tasks, "train", make(), only=["print", "photo"])
    pictures, rows = Pictures(images), [3, 6, 0, 12, 7]
    batch = pictures.collate([pictures[row] for row in rows])
    assert [value.dtype for value in batch.values() if isinstance(value, torch.Tensor)] == [torch.uint8]
    found = model_inputs(batch, CPU)
    for name, expected in collate([images[row] for row in rows]).items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert found["task_counts"] == torch.bincount(found["task_ids"], minlength=3).tolist() == [2, 0, 3]


@pytest.fixture
def make(clip, processor, tasks, arguments):
    def trainer(image_processor=processor.image_processor, collator=None, **fields):
        config = MmAPConfig(num_prompts=4, source_shape=(2, 4))
        classifier = MultiTaskClassifier(clip, processor, tasks, config)
        fields = {"sharing": "all", "per_device_eval_batch_size": 7, **fields}
        images = [TaskImages(tasks, split, image_processor) for split in ("train", "eval")]
        collators = {} if collator is None else {"data_collator": collator}
        return MultiTaskTrainer(classifier, arguments(**fields), *images, **collators)

    return trainer


def own_collator(items):
    assert "pixel_values" in items[0]
    return collate(items)


def test_evaluation_and_prediction_of_bytes_are_those_of_floats(make):
    found = []
    for collator in (None, own_collator):
        trainer = make(collator=collator)
        found.append((trainer.evaluate(), trainer.predict(trainer.train_dataset).predictions.tolist()))
        for metrics, _ in found:
            for name in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"):
                metrics.pop(f"eval_{name}", None)
        trainer.model.unload()
    assert found[0] == found[1]


def test_named_evaluation_images_are_bytes_too(make, tasks, processor):
    trainer = make()
    trainer.eval_dataset = {"all": trainer.eval_dataset, "own": list(trainer.eval_dataset)}
    assert "packed" in next(iter(trainer.get_eval_dataloader("all")))
    assert "pixel_values" in next(iter(trainer.get_eval_dataloader("own")))
    assert trainer.eval_dataset.keys() == {"all", "own"}
    assert trainer.data_collator is collate


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "packed"),
        ({"augment": "flip"}, "packed"),
        ({"collator": own_collator}, "pixel_values"),
        ({"collator": collate, "augment": "flip"}, "packed"),
        ({"collator": lambda items: collate(items), "augment": "flip"}, "pictures"),
        ({"image_processor": Siglip2ImageProcessorPil()}, "pixel_values"),
        ({"accelerator_config": {"dispatch_batches": True}}, "pixel_values"),
        ({"include_for_metrics": ["inputs"]}, "pixel_values"),
    ],
)
def test_what_travels(fields, key, make):
    trainer = make(**fields)
    batch = next(iter(trainer.get_train_dataloader()))
    assert key in batch
    inputs = trainer.model_inputs(batch)
    if key != "pixel_values":
        assert inputs["pixel_values"].shape == (6, 3, 48, 48)
    assert (inputs.get("task_counts") is not None) == (key == "packed")
    assert trainer.data_collator is fields.get("collator", collate)


def test_small_values_are_transferred_once():
    meta = torch.device("meta")
    first, again = (on_device([[1, 2], [3, 4]], meta) for _ in range(2))
    assert first is again and first.shape == (2, 2) and first.dtype == torch.int64
    others = [[[1, 2, 3, 4]], [[1, 2], [3, 5]], [[1.0, 2.0], [3.0, 4.0]], torch.ones(2, 2).int(), [], [[]]]
    found = [first, *(on_device(each, meta) for each in others)]
    assert len(set(map(id, found))) == len(found)
    host = torch.tensor([1, 2])
    assert on_device(host, CPU) is host
    assert on_device(first, meta) is first


def test_on_a_gpu_parameters_are_compared_by_versions_inside_many_passes(monkeypatch):
    monkeypatch.setattr(fingerprint, "on_host", lambda device: False)
    parameter = torch.nn.Parameter(torch.ones(3))
    with compared_by_versions():
        before = Fingerprint([parameter])
        parameter.data.add_(1)
        assert Fingerprint([parameter]) == before
        with torch.no_grad():
            parameter.add_(1)
        assert Fingerprint([parameter]) != before
    before = Fingerprint([parameter])
    parameter.data.add_(1)
    assert Fingerprint([parameter]) != before
