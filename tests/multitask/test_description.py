import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmap_peft import MmAPConfig, MultiTaskClassifier, ia3_config, ln_tuning_config, lora_config
from mmap_peft.data.pictograms import draw

from ..conftest import load_clip


MMAP, LORA = MmAPConfig(num_prompts=4, source_shape=(2, 4)), lora_config(r=2)
IMAGES = [draw("print", "sun", 0)]


@pytest.fixture
def save(clip, processor, tasks, tmp_path):
    """Saves a classifier as an early version did, without digests."""

    def saved(config):
        classifier = MultiTaskClassifier(clip, processor, tasks, config).eval()
        classifier.save_pretrained(tmp_path)
        edit(tmp_path / "tasks.json", lambda content: [content.pop(name) for name in ("files", "sha256")])
        return classifier, tmp_path

    return saved


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def probabilities(classifier):
    return torch.cat([classifier.predict(IMAGES, task).probabilities for task in classifier.tasks], dim=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["tasks"][0].update(dataset="\ud800"), "surrogates not allowed"),
        (lambda c: c["training"].update(settings={"\udfff": 1}), "surrogates not allowed"),
        (lambda c: c["training"].update(prompted={"print": 10**400}), "training.prompted"),
        (lambda c: c["training"].update(prompted={"print": 1.5}), "training.prompted"),
        (lambda c: c["tasks"][0].update(route=[]), "route"),
        (lambda c: c.update(grouping={"tasks": [], "groups": [], "similarity": [[1e300]]}), "similarity"),
    ],
)
def test_a_value_that_cannot_be_is_named_and_nothing_changes(change, named, save):
    classifier, folder = save(MMAP)
    before = probabilities(classifier)
    edit(folder / "tasks.json", change)
    for load in (MultiTaskClassifier.from_pretrained, classifier.load_adapters):
        with pytest.raises(ValueError, match=rf"tasks\.json.*{named}"):
            load(folder)
    assert torch.equal(probabilities(classifier), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_pattern": ["(a+)+$"], "layers_to_transform": [0], "target_modules": ["q_proj"]},
        {"target_modules": [r"(\w+\.?)+#"]},
        {"modules_to_save": [r"(\w+\.?)+#"]},
        {"rank_pattern": {"(a+)+$": 2}},
    ],
)
def test_an_expression_that_could_take_for_ever_is_refused_wherever_it_stands(settings, save):
    classifier, folder = save(LORA)
    edit(folder / "global" / "adapter_config.json", lambda content: content.update(settings))
    for load in (MultiTaskClassifier.from_pretrained, classifier.load_adapters):
        with pytest.raises(ValueError, match=r"adapter_config\.json holds .* could take very long"):
            load(folder)


def test_settings_that_no_model_can_have_are_refused_before_memory_is_taken(save):
    folder = save(LORA)[1]
    edit(folder / "global" / "adapter_config.json", lambda content: content.update(trainable_token_indices=[10**9]))
    with pytest.raises(ValueError, match=r"settings in adapter_config\.json do not fit the CLIPModel"):
        MultiTaskClassifier.from_pretrained(folder)


@pytest.mark.parametrize("config", [LORA, ia3_config(), ln_tuning_config()], ids=lambda config: type(config).__name__)
def test_settings_without_modules_are_refused_with_the_name_of_the_folder(config, save):
    folder = save(config)[1]
    edit(folder / "global" / "adapter_config.json", lambda content: content.update(target_modules=None))
    with pytest.raises(ValueError, match=r"The classifier in .* cannot be made: Please specify `target_modules`"):
        MultiTaskClassifier.from_pretrained(folder)


def fill(folder, value, dtype):
    for path in folder.glob("*/*.safetensors"):
        tensors = {name: torch.full(tensor.shape, value, dtype=dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def test_numbers_beyond_the_dtype_are_refused_and_those_of_another_dtype_are_not(save, clip_folder):
    classifier, folder = save(MMAP)
    fill(folder, 1e300, torch.float64)
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors holds numbers in .* that torch\.float32 has not"
    ):
        classifier.load_adapters(folder)
    fill(folder, 0.25, torch.float64)
    classifier.load_adapters(folder)
    expected = probabilities(classifier)
    fill(folder, 0.25, torch.float32)
    again = MultiTaskClassifier.from_pretrained(folder, load_clip(clip_folder), classifier.processor)
    assert torch.equal(probabilities(again), expected)


def test_predictions_that_are_not_finite_are_an_error(save):
    folder = save(LORA)[1]
    fill(folder, 3e38, torch.float32)
    with pytest.raises(ValueError, match="Probabilities are not finite"):
        probabilities(MultiTaskClassifier.from_pretrained(folder))


def test_adapters_of_other_settings_are_loaded_on_demand_only(save):
    classifier, folder = save(LORA)
    edit(folder / "global" / "adapter_config.json", lambda content: content.update(lora_alpha=16))
    with pytest.raises(ValueError, match=r"was saved with lora_alpha=16, but the classifier has 8"):
        classifier.load_adapters(folder)
    classifier.load_adapters(folder, verify=False)


def test_a_zero_shot_classifier_loads_no_adapters(save, processor, tasks):
    classifier, folder = save(LORA)
    zero_shot = MultiTaskClassifier(classifier.model.unload(), processor, tasks)
    with pytest.raises(ValueError, match="zero-shot classifier has no adapters to load"):
        zero_shot.load_adapters(folder)
