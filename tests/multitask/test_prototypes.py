import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmap_peft import MmAPConfig, MultiTaskClassifier, RoutedPrediction, Task, lora_config
from mmap_peft.multitask.prototypes import fit_scale

from ..conftest import load_clip
from ..tuner.test_families import build


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
FILE = "prototypes.safetensors"


def picture(red, green, blue, seed=0):
    noise = np.random.default_rng(seed).integers(-20, 21, (48, 48, 3))
    return Image.fromarray((np.array([red, green, blue]) + noise).clip(0, 255).astype(np.uint8))


COLOURS = {
    "warm": {"dark": (120, 0, 0), "light": (255, 120, 120)},
    "cold": {"dark": (0, 0, 120), "grey": (90, 160, 255)},
}


def colour_task(name, images=4):
    rows = [(picture(*colour, seed), shade) for shade, colour in COLOURS[name].items() for seed in range(images)]
    return Task(name, list(COLOURS[name]), train=rows)


def images_of(name):
    return [picture(*colour, 100) for colour in COLOURS[name].values()]


@pytest.fixture
def classifier(clip, processor):
    made = MultiTaskClassifier(clip, processor, list(map(colour_task, COLOURS)), CONFIG).eval()
    made.compute_prototypes(batch_size=3)
    return made


@pytest.fixture
def folder(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def same(first, second):
    return first.scale == second.scale and all(
        torch.equal(part, second.features[name]) and part.dtype == second.features[name].dtype
        for name, part in first.features.items()
    )


def test_images_of_clearly_different_tasks_find_them(classifier):
    images = images_of("cold") + images_of("warm")
    found = classifier.predict(images)
    assert isinstance(found, RoutedPrediction)
    assert found.tasks == ["cold", "cold", "warm", "warm"]
    assert found.class_names == ["dark", "light", "grey"]
    assert found.probabilities.shape == (4, 3)
    assert found.task_probabilities.shape == (4, 2)
    assert found.labels == [found.class_names[column] for column in found.probabilities.argmax(1).tolist()]
    for probabilities in (found.probabilities, found.task_probabilities):
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_probabilities_are_the_sum_over_tasks(classifier):
    images = images_of("cold") + images_of("warm")
    for scale, rare in ((1.0, False), (classifier.prototypes.scale, True)):
        classifier.prototypes.scale = scale
        found = classifier.predict(images)
        weights = found.task_probabilities
        assert bool((weights < 0.05).any()) == rare
        weights = weights.where(weights >= 0.05, 0)
        weights = weights / weights.sum(1, keepdim=True)
        warm, cold = (
            classifier.predict(images, name).probabilities * weights[:, [n]] for n, name in enumerate(COLOURS)
        )
        expected = torch.stack([warm[:, 0] + cold[:, 0], warm[:, 1], cold[:, 1]], dim=1)
        torch.testing.assert_close(found.probabilities, expected)


def test_prototypes_are_the_mean_features_of_the_plain_base(classifier, clip_folder, processor):
    plain = load_clip(clip_folder)
    for name, task in classifier.tasks.items():
        pixels = processor.image_processor([image for image, _ in task.train], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = torch.nn.functional.normalize(plain.get_image_features(pixels).pooler_output, dim=-1)
        means = torch.nn.functional.normalize(torch.stack([features[:4].mean(0), features[4:].mean(0)]), dim=-1)
        torch.testing.assert_close(classifier.prototypes.features[name].float(), means, atol=1e-3, rtol=0)


def test_adapters_do_not_change_prototypes(clip, processor, classifier):
    made = MultiTaskClassifier(
        load_clip(clip.name_or_path), processor, list(map(colour_task, COLOURS)), lora_config(r=2)
    )
    with torch.no_grad():
        for parameter in made.adapter_parameters("global").values():
            parameter.add_(0.3)
    made.compute_prototypes()
    assert made.predict(images_of("warm")).tasks == ["warm", "warm"]
    for name, part in made.prototypes.features.items():
        torch.testing.assert_close(part, classifier.prototypes.features[name], atol=1e-3, rtol=0)
    assert made.training and all(parameter.requires_grad for parameter in made.adapter_parameters("global").values())
    before = copy.deepcopy(classifier.prototypes)
    classifier.reset_adapters()
    assert same(classifier.prototypes, before)


def test_the_scale_is_high_only_where_tasks_can_be_told_apart():
    torch.manual_seed(0)
    centres, classes = torch.eye(8)[:4], torch.arange(4).repeat(50)
    scales = []
    for noise in (0.1, 0.3, 1.0):
        features = torch.nn.functional.normalize(centres[classes] + noise * torch.randn(200, 8), dim=-1)
        scales.append(fit_scale(features, classes, [2, 2]))
    assert scales[0] > scales[1] > scales[2]
    assert fit_scale(torch.nn.functional.normalize(torch.randn(200, 8), dim=-1), classes, [2, 2]) < 3
    assert fit_scale(centres, torch.arange(4), [1, 3]) > 0  # no class has another image


def test_a_class_without_training_images_has_no_prototype(clip, processor):
    tasks = list(map(colour_task, COLOURS))
    tasks[0] = Task("warm", ["none", "dark", "light"], train=tasks[0].train)
    made = MultiTaskClassifier(clip, processor, tasks)
    made.compute_prototypes()
    assert made.prototypes.features["warm"].any(1).tolist() == [False, True, True]
    assert made.predict(images_of("warm") + images_of("cold")).tasks == ["warm", "warm", "cold", "cold"]


def test_threads_with_and_without_a_task_do_not_disturb_each_other(classifier):
    images = images_of("warm")
    routed, given = classifier.predict(images).probabilities, classifier.predict(images, "cold").probabilities
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: classifier.predict(images, task).probabilities, [None, "cold"] * 10))
    assert all(torch.equal(each, (routed, given)[number % 2]) for number, each in enumerate(found))


def test_nothing_is_predicted_of_no_images(classifier):
    found = classifier.predict([])
    assert (found.labels, found.tasks) == ([], [])
    assert found.probabilities.shape == (0, 3)
    assert found.task_probabilities.shape == (0, 2)


def test_the_best_of_many_tasks_counts_however_improbable(clip, processor):
    rng = np.random.default_rng(0)
    rows = [(Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)), number % 2) for number in range(2)]
    made = MultiTaskClassifier(clip, processor, [Task(f"task {n}", ["a", "b"], train=rows) for n in range(25)])
    made.compute_prototypes()
    found = made.predict(rows[0][0])
    assert found.task_probabilities.max() < 0.05
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(1))


def test_tasks_without_prototypes_or_images_are_named(clip, processor, classifier):
    made = MultiTaskClassifier(load_clip(clip.name_or_path), processor, [Task("warm", ["a", "b"])])
    with pytest.raises(ValueError, match=r"Task 'warm' has no prototypes.*call compute_prototypes\(\)"):
        made.predict(images_of("warm"))
    with pytest.raises(ValueError, match="Task 'warm' has no training images"):
        made.compute_prototypes()
    with pytest.raises(ValueError, match="`batch_size`: expected an integer of 1 or more"):
        made.compute_prototypes(batch_size=0)
    classifier.add_task(Task("new", ["a", "b"]))
    with pytest.raises(ValueError, match="Task 'new' has no prototypes"):
        classifier.predict(images_of("warm"))
    before = classifier.prototypes
    with pytest.raises(ValueError, match="Task 'new' has no training images"):
        classifier.compute_prototypes()
    assert classifier.prototypes is before


def test_images_that_cannot_be_read_are_refused_or_skipped(clip, processor, classifier, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    tasks = list(map(colour_task, COLOURS))
    tasks[0].train.append((str(tmp_path / "bad.png"), "dark"))
    made = MultiTaskClassifier(load_clip(clip.name_or_path), processor, tasks)
    with pytest.raises(ValueError, match=r"bad\.png of task 'warm' cannot be read"):
        made.compute_prototypes()
    made.compute_prototypes(3, unreadable="skip")
    assert same(made.prototypes, classifier.prototypes)
    del tasks[0].train[:-1]
    with pytest.raises(ValueError, match="No image of task 'warm' can be read"):
        made.compute_prototypes(unreadable="skip")


def test_prototypes_are_saved_and_loaded_to_the_bit(classifier, folder):
    again = MultiTaskClassifier.from_pretrained(folder)
    assert same(again.prototypes, classifier.prototypes)
    images = images_of("warm")
    found, expected = again.predict(images), classifier.predict(images)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert torch.equal(found.task_probabilities, expected.task_probabilities)
    classifier.prototypes = None
    classifier.load_adapters(folder)
    assert same(again.prototypes, classifier.prototypes)


def test_a_task_can_be_added_to_a_loaded_classifier(folder):
    loaded = MultiTaskClassifier.from_pretrained(folder)
    before = loaded.prototypes
    rows = [(picture(0, 200, 0, seed), "green") for seed in range(3)]
    loaded.add_task(Task("green", ["green", "black"], train=rows))
    loaded.save_pretrained(folder)  # with prototypes of two of the three tasks
    assert same(MultiTaskClassifier.from_pretrained(folder).prototypes, before)
    loaded.compute_prototypes()
    assert same(before, loaded.prototypes)
    assert loaded.predict([picture(0, 200, 0, 9), *images_of("cold")]).tasks == ["green", "cold", "cold"]


def test_a_folder_without_prototypes_or_with_those_of_an_earlier_saving_loads(classifier, folder):
    before, classifier.prototypes = classifier.prototypes, None
    classifier.save_pretrained(folder)
    assert (folder / FILE).exists()
    assert MultiTaskClassifier.from_pretrained(folder).prototypes is None
    classifier.prototypes = before
    classifier.load_adapters(folder)
    assert classifier.prototypes is before


def damage(tensors, way):
    name = "prototypes.warm"
    if way == "shape":
        tensors[name] = tensors[name][:1].clone()
    elif way == "dtype":
        tensors[name] = tensors[name].float()
    elif way == "nan":
        tensors[name][0, 0] = float("nan")
    elif way == "long":
        tensors[name] *= 2
    elif way == "zeros":
        tensors[name] *= 0
    elif way == "other task":
        tensors["prototypes.other"] = tensors.pop(name)
    elif way == "no scale":
        del tensors["scale"]
    else:
        tensors["scale"] *= -1


WAYS = ["shape", "dtype", "nan", "long", "zeros", "other task", "no scale", "scale"]


@pytest.mark.parametrize("way", ["cut", "missing", "flipped", *WAYS])
def test_damaged_prototypes_are_refused_and_nothing_changes(way, classifier, folder):
    path = folder / FILE
    content = bytearray(path.read_bytes())
    if way == "missing":
        path.unlink()
    elif way in ("cut", "flipped"):
        content[-9] ^= 1
        path.write_bytes(content[:-10] if way == "cut" else content)
    else:
        tensors = load_file(path)
        damage(tensors, way)
        save_file(tensors, path)
    with torch.no_grad():
        classifier.adapter_parameters("global")["source"].add_(1)
    before, source = classifier.prototypes, classifier.adapter_parameters("global")["source"].clone()
    for verify in (True,) if way in ("missing", "flipped") else (True, False):
        for load in (MultiTaskClassifier.from_pretrained, classifier.load_adapters):
            with pytest.raises(ValueError, match=r"prototypes\.safetensors (is|holds) .*nothing was loaded"):
                load(folder, verify=verify)
    assert classifier.prototypes is before
    assert torch.equal(classifier.adapter_parameters("global")["source"], source)


def test_prototypes_that_are_not_finite_are_not_saved(classifier, tmp_path):
    classifier.prototypes.features["warm"][0] = float("nan")
    with pytest.raises(ValueError, match="Probabilities are not finite"):
        classifier.predict(images_of("warm"))
    with pytest.raises(ValueError, match="A prototype holds"):
        classifier.save_pretrained(tmp_path)


def test_the_digest_of_the_prototypes_is_in_the_description(folder):
    assert FILE in json.loads((folder / "tasks.json").read_text())["files"]


@pytest.mark.parametrize("family", ["siglip", "metaclip_2", "clipseg"])
def test_other_families_have_prototypes(family, processor, tmp_path):
    special = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build(family, vocab_size=len(processor.tokenizer), **special)
    made = MultiTaskClassifier(model, processor, list(map(colour_task, COLOURS)), CONFIG)
    made.compute_prototypes()
    made.save_pretrained(tmp_path)
    made.load_adapters(tmp_path)
    assert made.predict(images_of("warm")).tasks == ["warm", "warm"]
