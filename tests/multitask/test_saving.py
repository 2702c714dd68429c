import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mmap_peft import MmAPConfig, MultiTaskClassifier, TaskGrouping, use_routes
from mmap_peft.data.pictograms import draw

from ..conftest import load_clip


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
IMAGES = [draw("print", "sun", number) for number in range(2)]


@pytest.fixture
def classifier(clip, processor, tasks):
    made = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    names = list(made.tasks)
    snapshots = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).numpy()
    made.set_grouping(TaskGrouping(names, [["print", "photo"], ["clipart"]], snapshots.mean(0), snapshots))
    return made.eval()


@pytest.fixture
def folder(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def describe(folder, **changes):
    """Change `tasks.json`, as if it had been saved so by an early version, without digests."""
    description = {**json.loads((folder / "tasks.json").read_text()), **changes}
    for digests in ("files", "sha256"):
        del description[digests]
    (folder / "tasks.json").write_text(json.dumps(description))


def probabilities(classifier):
    return torch.cat([classifier.predict(IMAGES, task).probabilities for task in classifier.tasks], dim=1)


def test_a_folder_gives_the_classifier_back_to_the_bit(classifier, folder):
    again = MultiTaskClassifier.from_pretrained(folder)
    assert torch.equal(probabilities(again), probabilities(classifier))
    assert again.routes == classifier.routes
    assert again.grouping.to_dict() == classifier.grouping.to_dict()
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "tasks.json", "config.json", "affinity.safetensors", "grouping.png",
        "group_0", "group_1", "print", "clipart", "photo",
    }  # fmt: skip


def test_a_folder_of_an_early_version_has_the_matrices_in_tasks_json(classifier, folder):
    assert "snapshots" not in json.loads((folder / "tasks.json").read_text())["grouping"]
    describe(folder, grouping=classifier.grouping.to_dict())
    assert MultiTaskClassifier.from_pretrained(folder).grouping.to_dict() == classifier.grouping.to_dict()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"similarity": torch.ones(2, 2)}, "similarity has no row and column for each task"),
        ({"reliability": torch.full((3,), 1e300, dtype=torch.float64)}, "reliability holds numbers larger than"),
        ({"groups": torch.ones(3)}, "'groups' is none of similarity"),
        ({"together": torch.full((3, 3), torch.nan)}, "not finite"),
    ],
)
def test_matrices_that_cannot_be_are_refused_and_nothing_changes(tensors, named, classifier, folder):
    save_file(tensors, folder / "affinity.safetensors")
    before = classifier.grouping
    with pytest.raises(ValueError, match=r"affinity\.safetensors is damaged"):
        classifier.load_adapters(folder)
    with pytest.raises(ValueError, match=rf"affinity\.safetensors.*{named}"):
        classifier.load_adapters(folder, verify=False)
    assert classifier.grouping is before


def test_the_config_of_a_clip_in_the_same_folder_stays(clip_folder, processor, tasks, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "both")
    config = (tmp_path / "both" / "config.json").read_bytes()
    clip = load_clip(tmp_path / "both")
    made = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    for _ in range(2):
        made.save_pretrained(tmp_path / "both")
        assert (tmp_path / "both" / "config.json").read_bytes() == config
    assert torch.equal(
        probabilities(MultiTaskClassifier.from_pretrained(tmp_path / "both")), probabilities(made.eval())
    )


def test_each_folder_is_a_peft_adapter_of_its_own(classifier, folder, clip_folder):
    clip = load_clip(clip_folder)
    model = PeftModel.from_pretrained(clip, str(folder), subfolder="print").eval()
    pixels = {"pixel_values": torch.randn(2, 3, 48, 48)}
    with use_routes(classifier.model, ("print",)):
        expected = classifier.model.get_image_features(**pixels).pooler_output
    assert torch.equal(model.get_image_features(**pixels).pooler_output, expected)


def test_saving_again_keeps_other_files(classifier, folder):
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "note").write_text("mine")
    classifier.save_pretrained(folder)
    assert (folder / "checkpoint-1" / "note").read_text() == "mine"
    assert not [path for path in folder.iterdir() if path.name.startswith(".saving")]


@pytest.mark.parametrize("damage", ["cut", "missing", "other shape"])
def test_a_damaged_adapter_is_refused_and_nothing_changes(damage, classifier, folder, clip, processor, tasks):
    path = folder / "photo" / "adapter_model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "missing":
        path.unlink()
    else:
        save_file({name: tensor[:1].clone() for name, tensor in load_file(path).items()}, path)
    fresh = MultiTaskClassifier(load_clip(clip.name_or_path), processor, tasks, CONFIG).eval()
    before, adapters = probabilities(fresh), fresh.adapters
    with pytest.raises(ValueError, match=r"photo.adapter_model\.safetensors is (missing|damaged).*nothing was loaded"):
        fresh.load_adapters(folder)
    assert fresh.adapters == adapters
    assert torch.equal(probabilities(fresh), before)
    with pytest.raises(ValueError, match="nothing was loaded"):
        MultiTaskClassifier.from_pretrained(folder)


def test_other_tasks_are_refused(folder, clip_folder, processor, tasks):
    fresh = MultiTaskClassifier(load_clip(clip_folder), processor, tasks[:2], CONFIG)
    with pytest.raises(ValueError, match=r"is of the tasks .* but the classifier has"):
        fresh.load_adapters(folder)


@pytest.mark.parametrize("name", ["../evil", "/etc", "x y", ""])
def test_names_that_are_no_folder_names_are_refused(name, folder):
    description = json.loads((folder / "tasks.json").read_text())
    description["adapters"].append(name)
    (folder / "tasks.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="which are no names of adapter folders"):
        MultiTaskClassifier.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{"])
def test_an_unreadable_description_is_refused(content, folder):
    (folder / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no readable tasks\.json"):
        MultiTaskClassifier.from_pretrained(folder)


@pytest.mark.parametrize(
    "training",
    [None, [1], {"settings": "all"}, {"prompted": {"print": "best"}}, {"speed": {}}, {"settings": {"a": {}}}],
)
def test_a_record_of_training_that_is_none_is_refused(training, folder):
    description = json.loads((folder / "tasks.json").read_text())
    (folder / "tasks.json").write_text(json.dumps({**description, "training": training}))
    with pytest.raises(ValueError, match=r"holds no readable tasks\.json \(The record of training"):
        MultiTaskClassifier.from_pretrained(folder)


def test_a_folder_of_before_there_were_records_loads(classifier, folder):
    tasks = json.loads((folder / "tasks.json").read_text())["tasks"]
    for task in tasks:
        del task["dataset"]
    describe(folder, tasks=tasks, training={})
    assert torch.equal(probabilities(MultiTaskClassifier.from_pretrained(folder)), probabilities(classifier))


@pytest.mark.parametrize("base", [None, "/no/such/folder"])
def test_a_base_that_is_not_here_is_asked_for(base, classifier, folder, clip_folder):
    describe(folder, base_model=base)
    with pytest.raises(ValueError, match=r"load that base and write from_pretrained\(\.\.\., model=base\)"):
        MultiTaskClassifier.from_pretrained(folder)
    again = MultiTaskClassifier.from_pretrained(folder, model=load_clip(clip_folder))
    assert torch.equal(probabilities(again), probabilities(classifier))


def test_text_chunks_are_chosen_on_loading(classifier, folder):
    loaded = MultiTaskClassifier.from_pretrained(folder, text_chunk=2)
    assert loaded.text_chunk == 2
    assert torch.allclose(probabilities(loaded), probabilities(classifier), atol=1e-5)
    for wrong in (0, "2", 2.5):
        with pytest.raises(
            ValueError, match=f"Invalid value {wrong!r} for `text_chunk`: expected an integer of 1 or more"
        ):
            MultiTaskClassifier.from_pretrained(folder, text_chunk=wrong)


def test_an_unknown_keyword_is_refused_before_anything_is_read(folder):
    for keyword in ("revison", "seed", "modle"):
        with pytest.raises(TypeError, match=f"unknown keyword '{keyword}'"):
            MultiTaskClassifier.from_pretrained(folder, **{keyword: "1"})
    assert MultiTaskClassifier.from_pretrained(folder, token=False, local_files_only=True, max_workers=1).adapters


def test_a_zero_shot_classifier_has_nothing_to_save(clip, processor, tasks, tmp_path):
    with pytest.raises(ValueError, match="has no adapter to save"):
        MultiTaskClassifier(clip, processor, tasks).save_pretrained(tmp_path)


def adapter_file(folder, adapter):
    return folder / adapter / "adapter_model.safetensors"


@pytest.mark.parametrize("damage", ["swapped", "flipped", "older", "edited", "tasks"])
def test_files_that_were_not_saved_together_are_named_and_loaded_on_demand(damage, classifier, folder):
    named = "photo.adapter_model"
    if damage == "swapped":
        first, second = adapter_file(folder, "photo"), adapter_file(folder, "print")
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        named = "(photo|print).adapter_model"
    elif damage == "flipped":
        content = bytearray(adapter_file(folder, "photo").read_bytes())
        content[-2] ^= 1
        adapter_file(folder, "photo").write_bytes(content)
    elif damage == "older":
        content = adapter_file(folder, "photo").read_bytes()
        with torch.no_grad():
            classifier.adapter_parameters("photo")["source"].add_(1)
        classifier.save_pretrained(folder)
        adapter_file(folder, "photo").write_bytes(content)
    else:
        path, named = (
            (folder / "photo" / "adapter_config.json", "photo.adapter_config")
            if damage == "edited"
            else (folder / "tasks.json", "tasks.json")
        )
        path.write_text(path.read_text().replace("0.5" if damage == "edited" else "a photo of", "0.25"))
    with pytest.raises(ValueError, match=rf"{named}.* is damaged.*write verify=False"):
        MultiTaskClassifier.from_pretrained(folder)
    assert MultiTaskClassifier.from_pretrained(folder, verify=False).adapters == classifier.adapters


def test_other_spaces_and_line_ends_in_the_description_do_no_harm(classifier, folder):
    path = folder / "tasks.json"
    path.write_bytes(json.dumps(json.loads(path.read_text()), indent=4).replace("\n", "\r\n").encode())
    assert torch.equal(probabilities(MultiTaskClassifier.from_pretrained(folder)), probabilities(classifier))


def test_weights_that_are_not_finite_are_not_saved(classifier, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with torch.no_grad():
        classifier.adapter_parameters("photo")["source"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Adapter 'photo' holds numbers that are not finite, in '.*source'"):
        classifier.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_is_named(classifier, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file.out cannot be written \(Not a directory\)"):
        classifier.save_pretrained(tmp_path / "file" / "out")
