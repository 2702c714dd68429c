"""What is the same for an image at every step is computed once, and changes no bit."""

import dataclasses
import os
import tempfile

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, SiglipConfig, SiglipModel

from mmap_peft import (
    BitFitConfig,
    CLIPAdapterConfig,
    CoOpConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Task,
    VPTConfig,
    lora_config,
)
from mmap_peft.multitask.feature_cache import CachedImages, FeatureCache, picture_digest
from mmap_peft.multitask.images import TaskImages
from mmap_peft.multitask.row_files import KEYS, ROWS, root_folder
from mmap_peft.tuner.images import ImageStates, first_changed_layer, image_features, image_states

from ..conftest import tiny_clip


LATE = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1, first_layer=1)
LAST_LORA = {"target_modules": r".*vision_model.*layers\.1\..*q_proj"}


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Where features are kept; empty at first. Its path is short, as in `conftest.py`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        monkeypatch.setenv("TMPDIR", own)
        monkeypatch.setattr("tempfile.tempdir", own)
        yield root_folder()


@pytest.fixture
def make(clip_folder, processor, tasks, arguments, tmp_path):
    """Makes a trainer of a few steps."""

    def trainer(config=LATE, **fields):
        classifier = MultiTaskClassifier(CLIPModel.from_pretrained(clip_folder), processor, tasks, config)
        settings = {"max_steps": 9, "sharing": "all", "grouping_steps": 0, "grouping": "all", "save_strategy": "no"}
        args = arguments(**{"output_dir": str(tmp_path / "out"), **settings, **fields})
        return MultiTaskTrainer(model=classifier, args=args)

    return trainer


def trained(trainer, **kwargs):
    """Losses and weights of a training, and the logits of evaluation images."""
    trainer.train(**kwargs)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = [parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad]
    return [torch.tensor(losses), *weights, torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def rows(folder):
    """Number of images whose features are kept."""
    return sum(path.stat().st_size for path in folder.glob(f"*/*{KEYS}")) // 20


# Up to transformers 5.20 by the first name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(MultiTaskTrainingArguments)}
)
METHODS = {
    "mmap": (LATE, 1, {"sharing": "groups", "grouping": "gradient", "grouping_steps": 3, "grouping_snapshots": 1}),
    "vpt": (VPTConfig(num_prompts=2, first_layer=1), 1, {CHECKPOINTING: True, "max_steps": 5}),
    "coop": (CoOpConfig(num_prompts=2), 2, {}),
    "probe": (LinearProbeConfig(), 2, {"bf16": True}),
    "clip_adapter": (CLIPAdapterConfig(), 2, {"dataloader_num_workers": 1, "max_steps": 5}),
    "lora": (lora_config(**LAST_LORA), 1, {}),
    "augmented": (LATE, 1, {"augment": "crop+flip", "augment_views": 2}),
}


# Python 3.12 warns of any fork beside threads, which torch has
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", METHODS)
def test_losses_and_weights_are_those_without_it_in_the_first_run_and_in_the_next(name, make, folder, monkeypatch):
    config, layer, fields = METHODS[name]
    expected = trained(make(config, cache_features="never", **fields))
    assert not folder.exists()
    first = make(config, **fields)
    assert same(trained(first), expected)
    cache, images = first.feature_cache(), len(first.train_dataset) + len(first.eval_dataset)
    assert cache.layer == layer
    kept = rows(folder)
    assert 0 < kept <= images * (2 if name == "augmented" else 1) + len(first.train_dataset)
    second = make(config, **fields)
    monkeypatch.setattr(FeatureCache, "compute", None)  # no image is computed again
    assert same(trained(second), expected)
    assert rows(folder) == kept


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_training_is_the_same_up_to_rounding(make, folder):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 3}
    plain, kept = (trained(make(cache_features=how, **compiled)) for how in ("never", "always"))
    assert rows(folder)
    for one, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_images_that_are_kept_are_not_decoded(make, monkeypatch):
    whole = {"max_steps": 8}  # two epochs: accelerate reads one batch ahead, which would never be computed
    expected = trained(make(**whole))
    trainer, without = make(**whole), make(cache_features="never", **whole)
    monkeypatch.setattr(TaskImages, "read", None)
    assert same(trained(trainer), expected)
    with pytest.raises(TypeError):
        trained(without)


@pytest.mark.parametrize("harm", ["rows", "half of the files", "no space"])
def test_features_that_are_lost_or_do_not_fit_are_computed(harm, make, folder, caplog):
    expected = trained(make())
    fields = {}
    for path in folder.glob(f"*/*{ROWS}"):
        content = bytearray(path.read_bytes())
        content[:: 4 * 10 * 48] = bytes(len(content[:: 4 * 10 * 48]))
        path.write_bytes(content if harm == "rows" else content[: len(content) // 2])
    if harm == "no space":
        fields["image_cache_gb"] = 12 * 1940 / 1e9
        for path in folder.glob("*/*"):
            path.unlink()
    assert same(trained(make(**fields)), expected)
    assert harm != "no space" or rows(folder) == 12


def test_a_resumed_training_equals_an_uninterrupted_one(make, folder, tmp_path):
    expected = trained(make(cache_features="never"))
    trainer = make(save_strategy="steps", save_steps=4)
    trainer.train()
    for path in sorted(folder.glob(f"*/*{KEYS}")):  # as if it had been killed
        os.truncate(path, 13 * 20 + 7)
    assert same(trained(make(), resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))[1:], expected[1:])


def test_half_precision_rounds_first_and_later_visits_alike(make, folder):
    first = trained(make(cache_dtype="bfloat16"))
    assert same(trained(make(cache_dtype="bfloat16")), first)
    assert not same(trained(make(cache_features="never")), first)
    assert sum(path.stat().st_size for path in folder.glob(f"*/*{ROWS}")) == rows(folder) * 10 * 48 * 2


def test_other_weights_or_settings_share_nothing(make):
    names = []
    for change in (None, None, "weight", "size", "attention", "dtype"):
        trainer = make(**({"cache_dtype": "float16"} if change == "dtype" else {}))
        clip, processor = trainer.model.clip, trainer.model.processor.image_processor
        if change == "weight":
            clip.vision_model.encoder.layers[0].mlp.fc2.bias.data[3] += 1e-3
        elif change == "attention":
            clip.set_attn_implementation("eager")
        before = processor.do_rescale
        try:
            processor.do_rescale = change != "size"
            names.append(trainer.feature_cache().name)
        finally:
            processor.do_rescale = before
    assert names[0] == names[1] and len(set(names)) == 5


def test_weights_after_the_layer_do_not_matter(make):
    trainer = make()
    before = trainer.feature_cache().name
    trainer.model.clip.vision_model.encoder.layers[1].mlp.fc2.bias.data += 1
    assert trainer.feature_cache().name == before


REFUSED = {
    "first layer": (MmAPConfig(), {}, "adapters change the first layer"),
    "biases": (BitFitConfig(), {}, "adapters change the first layer"),
    "random changes": (LATE, {"augment": "flip"}, "augment_views=4"),
    "no space": (LATE, {"image_cache_gb": 0}, "there is no space"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_is_impossible_always_is_an_error_and_auto_is_off(name, make, folder):
    config, fields, reason = REFUSED[name]
    trainer = make(config, cache_features="always", **fields)
    with pytest.raises(ValueError, match=f"'always' for `cache_features`: expected 'auto', since.*{reason}"):
        trainer.get_train_dataloader()
    trainer = make(config, **fields)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "known" not in batch


def test_a_collator_of_a_user_gets_pixels(make):
    trainer = make()
    trainer.data_collator = lambda items: torch.utils.data.default_collate(items)
    assert "pixel_values" in next(iter(trainer.get_train_dataloader()))


LAYERS = {
    "nothing": (lambda clip: None, 2),
    "projection": (lambda clip: clip.visual_projection.requires_grad_(True), 2),
    "last layer": (lambda clip: clip.vision_model.encoder.layers[1].layer_norm1.requires_grad_(True), 1),
    "hook": (lambda clip: clip.vision_model.encoder.layers[1].mlp.register_forward_hook(print), 1),
    "hook of the tower": (lambda clip: clip.vision_model.register_forward_pre_hook(print), 0),
    "parametrization": (
        lambda clip: torch.nn.utils.parametrizations.weight_norm(clip.vision_model.encoder.layers[1].mlp.fc1),
        1,
    ),
    "embeddings": (lambda clip: clip.vision_model.embeddings.position_embedding.requires_grad_(True), 0),
    "dropout": (lambda clip: setattr(clip.vision_model.config, "attention_dropout", 0.1), 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_layer_that_is_changed(name):
    clip = tiny_clip().requires_grad_(False)
    change, expected = LAYERS[name]
    change(clip)
    assert first_changed_layer(clip) == expected


def test_a_tower_that_cannot_be_split_has_only_whole_features():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    clip = SiglipModel(config).eval().requires_grad_(False)
    assert first_changed_layer(clip) == 3
    pixels = torch.randn(2, 3, 32, 32)
    states = image_states(clip, pixels, 3)
    assert torch.equal(image_features(clip, ImageStates(3, states)), clip.get_image_features(pixels).pooler_output)
    clip.vision_model.encoder.layers[1].requires_grad_(True)
    assert first_changed_layer(clip) == 0


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_both_parts_of_the_tower_are_the_tower(layer, clip, inputs):
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        found = image_features(clip, ImageStates(layer, image_states(clip, pixels, layer)))
        assert torch.equal(found, clip.get_image_features(pixels).pooler_output)


def test_states_do_not_depend_on_the_batch(clip):
    pixels = torch.randn(33, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = image_states(clip, pixels, 2)
        for size in (2, 3, 5, 8, 17, 32):
            assert torch.equal(image_states(clip, pixels[1 : 1 + size], 2), expected[1 : 1 + size])


def test_the_key_is_the_content_of_a_picture(tmp_path, make):
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        picture.save(path)
    content = paths[0].read_bytes()
    assert len({picture_digest(each) for each in (*map(str, paths), content, {"bytes": content, "path": None})}) == 1
    assert picture_digest(picture) == picture_digest(picture.copy()) != picture_digest(picture.rotate(180))
    with pytest.raises(ValueError, match="read only once"), open(paths[0], "rb") as file:
        picture_digest(file)
    trainer = make()
    task = Task("art", ["x", "y"], train=[{"image": picture, "label": 0}, {"image": str(paths[0]), "label": 1}])
    images = CachedImages(
        TaskImages([task], "train", trainer.model.processor.image_processor), trainer.feature_cache()
    )
    first = images[0]["key"]
    picture.paste((0, 0, 0), (0, 0, 40, 30))  # pictures in memory may change
    assert images[0]["key"] != first
    assert images[1]["key"] == images[1]["key"] is not None
