"""CLIP-LoRA is the LoRA and the training of its authors."""

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel, get_scheduler

from mmap_peft import (
    MultiTaskClassifier,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    clip_lora_arguments,
    clip_lora_config,
)

from ..conftest import TEXT_LAYERS, TEXT_WIDTH, VISION_LAYERS, VISION_WIDTH, load_clip, make_task


def test_the_update_is_that_of_the_formula(clip):
    model = get_peft_model(clip, clip_lora_config(init_lora_weights=False)).eval()
    layer = model.get_base_model().vision_model.encoder.layers[0].self_attn.k_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, VISION_WIDTH)
    assert a.shape == (2, VISION_WIDTH)
    expected = layer.base_layer(x) + x @ (b @ a).T / math.sqrt(2)
    torch.testing.assert_close(layer(x), expected)
    assert layer.lora_dropout["default"].p == 0.25


def test_it_is_in_queries_keys_and_values_of_all_layers_of_both_towers(clip):
    model = get_peft_model(clip, clip_lora_config())
    names = {name.split(".lora_A")[0] for name, _ in model.named_modules() if ".lora_A." in name}
    assert len(names) == 3 * (TEXT_LAYERS + VISION_LAYERS)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj"}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 3 * 2 * 2 * (TEXT_LAYERS * TEXT_WIDTH + VISION_LAYERS * VISION_WIDTH)


def test_its_size_is_that_of_the_page():
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
        size = get_peft_model(clip, clip_lora_config()).get_nb_trainable_parameters()[0]
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert size == 12 * 3 * 2 * 2 * (512 + 768)
    assert f"| {size:,} |" in page.read_text()


def test_fields_replace_those_of_the_recipe():
    config = clip_lora_config(r=4, use_rslora=False)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 1, False)
    with pytest.raises(TypeError, match="unknown keyword 'rank'"):
        clip_lora_config(rank=4)


@pytest.mark.parametrize("shots", [1, 2])
def test_the_learning_rate_follows_torchs_cosine(shots, tmp_path):
    args = MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **clip_lora_arguments(shots))
    assert args.max_steps == 500 * shots
    parameter = torch.nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.AdamW([parameter], lr=2e-4) for _ in range(2))
    schedule = get_scheduler(args.lr_scheduler_type, ours, 0, args.max_steps, args.lr_scheduler_kwargs)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, args.max_steps, eta_min=1e-6)
    for _ in range(args.max_steps):
        ours.step()
        theirs.step()
        schedule.step()
        cosine.step()
        assert schedule.get_last_lr()[0] == pytest.approx(cosine.get_last_lr()[0], rel=1e-6)


@pytest.mark.parametrize("shots", [0, -1, 1.5, True, "4", None])
def test_shots_are_a_count(shots):
    with pytest.raises(ValueError, match="for `shots`: expected an integer of 1 or more"):
        clip_lora_arguments(shots)


def test_a_training_uses_the_optimizer_of_the_recipe_and_is_saved_and_loaded(clip_folder, processor, tmp_path):
    base = load_clip(clip_folder)
    classifier = MultiTaskClassifier(base, processor, [make_task("print", 3)], clip_lora_config())
    settings = clip_lora_arguments(2, output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    args = MultiTaskTrainingArguments(**settings, disable_tqdm=True)
    trainer = MultiTaskTrainer(model=classifier, args=args)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (2e-4, 1e-2, (0.9, 0.999))
    assert all(group["weight_decay"] == 1e-2 for group in trainer.optimizer.param_groups if group["params"])
    classifier.save_pretrained(tmp_path / "saved")
    loaded = MultiTaskClassifier.from_pretrained(tmp_path / "saved")
    assert loaded.adapter_config.use_rslora
    pixels = torch.randn(2, 3, 48, 48)
    expected = classifier.probabilities(pixels, ["print"] * 2)
    assert torch.equal(loaded.probabilities(pixels, ["print"] * 2), expected)
