"""Training steps see augmented images, the same however they are read; nothing else does."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil, TrainerCallback

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, Task
from mmap_peft.multitask.augmentation import Augmentation, apply
from mmap_peft.multitask.images import TaskImages
from mmap_peft.multitask.sampler import TaskSampler
from mmap_peft.multitask.training_pictures import TrainingPictures, VisitSampler

from ..conftest import load_clip


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)
ALL = "crop+flip+jitter"


@pytest.fixture
def make(clip_folder, processor, tasks, arguments):
    def trainer(callbacks=(), own_tasks=None, **fields):
        classifier = MultiTaskClassifier(load_clip(clip_folder), processor, own_tasks or tasks, CONFIG)
        fields = {"sharing": "all", "augment": ALL, **fields}
        return MultiTaskTrainer(model=classifier, args=arguments(**fields), callbacks=list(callbacks))

    return trainer


def prompts(trainer):
    model = trainer.model
    return torch.cat([p.detach().flatten() for a in model.adapters for p in model.adapter_parameters(a).values()])


def pixels(trainer, epochs=(0,)):
    """What the model sees in some epochs, in the order of the sampler: the number of the image, visit, epoch, and a
    digest of its pixels."""
    seen = []
    for epoch in epochs:
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        batches = [trainer.model_inputs(batch)["pixel_values"] for batch in loader]
        places = list(trainer.sampler)
        assert {each for _, _, each in places} == {epoch}
        digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in torch.cat(batches)]
        seen += [(*place, digest) for place, digest in zip(places, digests, strict=True)]
    return seen


class Stop(TrainerCallback):
    def __init__(self, step, steps):
        self.step, self.steps = step, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.max_steps == self.steps:
            raise KeyboardInterrupt


# Python 3.12 warns of any fork beside threads, which torch has
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_an_image_is_the_same_with_any_batch_size_accumulation_and_workers(make):
    expected = {each[:3]: each[3] for each in pixels(make(), (0, 1))}
    for fields in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": False},
        {"image_cache_gb": 0.0},
    ):
        found = {each[:3]: each[3] for each in pixels(make(**fields), (0, 1))}
        shared = found.keys() & expected.keys()
        assert len(shared) > 40
        assert all(found[place] == expected[place] for place in shared)


def test_epochs_visits_and_seeds_change_an_image(make):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (60, 40 + size, 3), np.uint8) for size in range(11)]
    own_tasks = [
        Task(name, ["x", "y"], train=[{"image": image, "label": number % 2} for number, image in enumerate(images)])
        for name, images in (("few", noise[:2]), ("many", noise[2:]))
    ]
    seen = pixels(make(own_tasks=own_tasks), (0, 1, 2))
    assert max(visit for _, visit, _, _ in seen) > 0  # images of the small task come again
    assert len({digest for *_, digest in seen}) == len(seen)
    other = {each[:3]: each[3] for each in pixels(make(own_tasks=own_tasks, data_seed=5))}
    assert all(other[each[:3]] != each[3] for each in seen if each[:3] in other)


def test_visits_are_counted_and_the_order_is_that_of_the_plain_sampler():
    plain, visits = (kind([5, 2], 4, seed=3) for kind in (TaskSampler, VisitSampler))
    visits.set_epoch(6)
    plain.set_epoch(6)
    found = list(visits)
    assert [row for row, _, _ in found] == list(plain)
    assert [(visit, epoch) for row, visit, epoch in found if row == 5] == [(0, 6)]
    assert sorted({row: visit for row, visit, _ in VisitSampler([8, 1], 4)}.items())[-1] == (8, 3)


def test_without_crops_and_colours_a_step_sees_the_processors_pixels_or_their_mirror(make):
    trainer = make(augment="flip")
    plain, places = trainer.train_dataset, list(trainer.get_train_dataloader().batch_sampler.sampler)
    batches = [trainer.model_inputs(batch) for batch in trainer.get_train_dataloader()]
    seen = torch.cat([batch["pixel_values"] for batch in batches])
    mirrored = [not torch.equal(image, plain[row]["pixel_values"]) for image, (row, _, _) in zip(seen, places)]
    assert 0 < sum(mirrored) < len(mirrored)
    for image, (row, _, _), flipped in zip(seen, places, mirrored):
        assert torch.equal(image.flip(-1) if flipped else image, plain[row]["pixel_values"])
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [plain[row]["labels"] for row, _, _ in places]


def test_without_augmentation_batches_are_those_of_the_processor(make, processor):
    trainer = make(augment="none")
    rows = list(trainer.get_train_dataloader().batch_sampler.sampler)
    batches = [trainer.model_inputs(batch) for batch in trainer.get_train_dataloader()]
    assert all(batch.keys() == {"pixel_values", "labels", "task_ids", "task_counts"} for batch in batches)
    images = [row["image"] for task in trainer.model.tasks.values() for row in task.train]
    expected = processor.image_processor(images=[images[row] for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)
    assert type(trainer.sampler) is TaskSampler
    assert trainer.checkpoint_state().keys() == {"sampling", "order"}


def test_pixels_lie_in_the_range_of_the_processor(make):
    trainer = make(augment_jitter=[1.0, 1.0, 1.0, 0.5])
    table = torch.from_numpy(trainer.train_dataset.preprocessing.table)
    for batch in trainer.get_train_dataloader():
        assert batch["packed"].dtype == torch.uint8
        assert batch["packed"].shape[1:] == (8 + 8 + 3 * 96 * 96,)
        seen = trainer.model_inputs(batch)["pixel_values"]
        assert seen.shape[1:] == (3, 48, 48)
        assert (seen.amin((0, 2, 3)) >= table.amin(1)).all() and (seen.amax((0, 2, 3)) <= table.amax(1)).all()


@pytest.mark.parametrize(("stage", "step"), [(1, 2), (2, 5)])
def test_resuming_equals_the_uninterrupted_run(stage, step, make, tmp_path):
    fields = {"sharing": "groups", "grouping_steps": 3, "max_steps": 6, "save_steps": 1}
    whole = make(output_dir=str(tmp_path / "whole"), **fields)
    whole.train()
    steps = fields["grouping_steps"] if stage == 1 else fields["max_steps"]
    cut = make([Stop(step, steps)], output_dir=str(tmp_path / "cut"), **fields)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make(output_dir=str(tmp_path / "cut"), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(prompts(resumed), prompts(whole))


def test_resuming_with_another_augmentation_stops_with_a_sentence(make):
    make(max_steps=2).train()
    sentence = r"was trained with augment=crop.*, but now it is {}.* resume with the same .*augment"
    for fields, now in (
        ({"augment": "none"}, "none"),
        ({"augment": "flip"}, "flip"),
        ({"augment_scale": [0.5, 1.0]}, r"crop\(0\.5, 1\.0\)"),
    ):
        with pytest.raises(ValueError, match=sentence.format(now)):
            make(max_steps=4, **fields).train(resume_from_checkpoint=True)
    make(max_steps=4, augment="jitter+flip+crop").train(resume_from_checkpoint=True)


def test_a_checkpoint_without_augmentation_is_no_place_to_augment_from(make):
    make(augment="none", max_steps=2).train()
    with pytest.raises(ValueError, match=r"was trained with augment=none, but now it is flip"):
        make(augment="flip", max_steps=4).train(resume_from_checkpoint=True)


def test_evaluation_prototypes_and_snapshots_see_plain_images(make):
    plain, augmented = make(augment="none", max_steps=2), make(max_steps=2)
    augmented.train()
    plain.model.share_one_adapter()
    for name, parameter in plain.model.adapter_parameters("global").items():
        parameter.data.copy_(augmented.model.adapter_parameters("global")[name])
    for images in ("train_dataset", "eval_dataset"):
        one, other = (trainer.evaluate(getattr(trainer, images)) for trainer in (plain, augmented))
        assert one["eval_loss"] == other["eval_loss"]
    for trainer in (plain, augmented):
        trainer.model.reset_adapters()
        trainer.model.compute_prototypes()
    stages = [trainer.shared_adapter_trainer() for trainer in (plain, augmented)]
    one, other = (stage.snapshot() for stage in stages)
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
    one, other = (trainer.model.prototypes for trainer in (plain, augmented))
    assert all(torch.equal(getattr(one, name), value) for name, value in vars(other).items() if torch.is_tensor(value))


def test_training_with_augmentation_differs(make):
    losses = [make(augment=augment).train().training_loss for augment in ("none", "flip", "crop", "jitter")]
    assert len(set(losses)) == 4


@pytest.fixture
def photos(tmp_path):
    """A task of smooth pictures in files, some wide and some high."""
    rows = []
    for number, size in enumerate([(200, 150), (120, 180), (90, 90), (300, 100)]):
        x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
        pixels = np.stack([200 * x, 255 * y, 127 + 90 * np.sin(4 * x + number)], axis=-1)
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "label": number % 2})
    return Task("photos", ["x", "y"], train=rows)


def test_pictures_from_the_cache_are_those_that_were_read(photos, processor):
    kept, fresh = (TaskImages([photos], "train", processor.image_processor, cache_bytes=size) for size in (1e9, 0))
    for parts in (("crop", "flip"), ("flip",)):
        one, other = (TrainingPictures(images, Augmentation(parts), seed=0) for images in (kept, fresh))
        for _ in range(2):
            for row in range(4):
                first, second = one[row, 0, 0], other[row, 0, 0]
                assert np.array_equal(first["pictures"], second["pictures"])
                assert np.array_equal(first["changes"], second["changes"])
                assert first["labels"] == second["labels"] == row % 2
                assert one._cache.get(row) is not None and other._cache.get(row) is None


def test_pictures_are_whole_and_crops_have_their_real_geometry(photos, processor):
    pictures = TrainingPictures(
        TaskImages([photos], "train", processor.image_processor), Augmentation(("crop",), (0.2, 0.3)), seed=0
    )
    for row, (width, height) in enumerate([(200, 150), (120, 180), (90, 90), (300, 100)]):
        item = pictures[row, 0, 0]
        whole = Image.open(photos.train[row]["image"]).resize((96, 96), Image.Resampling.BICUBIC)
        assert np.array_equal(item["pictures"].transpose(1, 2, 0), np.asarray(whole))
        left, top, right, bottom = item["changes"][:4]
        assert 3 / 4 <= (right - left) * width / ((bottom - top) * height) <= 4 / 3


def test_crops_of_stored_pictures_are_near_those_of_the_files(photos, processor, make):
    trainer = make(own_tasks=[photos], augment="crop", per_device_train_batch_size=4)
    pictures = trainer.training_pictures()
    for row in range(4):
        item, original = pictures[row, 0, 0], Image.open(photos.train[row]["image"])
        box = np.round(item["changes"][:4] * 96) / 96 * np.tile(original.size, 2)
        expected = np.asarray(original.resize((48, 48), Image.Resampling.BICUBIC, box=tuple(box))).astype(float)
        picture = torch.from_numpy(item["pictures"].copy())
        found = apply(item["changes"][None], picture[None], (48, 48))[0].permute(1, 2, 0).numpy()
        assert np.sqrt(((found - expected) ** 2).mean()) < 1.5


@pytest.mark.parametrize(
    "make_processor", [Siglip2ImageProcessorPil, lambda: CLIPImageProcessorPil(do_resize=False, do_center_crop=False)]
)
def test_a_processor_that_is_one_step_only_cannot_augment(make_processor, tasks):
    images = TaskImages(tasks, "train", make_processor())
    with pytest.raises(ValueError, match=r"augment='crop\+flip' cannot be used, .* does not separate; write augment="):
        TrainingPictures(images, Augmentation(("crop", "flip")), seed=0)
