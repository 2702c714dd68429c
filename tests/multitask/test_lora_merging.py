"""Merged LoRA adapters are TIES of their updates, as numpy computes it."""

import re

import numpy as np
import pytest
import torch

from mmap_peft import (
    BitFitConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    clip_lora_config,
    ia3_config,
    lora_config,
    merge_lora,
)

from ..conftest import VISION_WIDTH, load_clip, make_task, tiny_clip


KEY = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
STYLES = ("print", "clipart", "photo")


@pytest.fixture
def make(clip_folder, processor):
    """Makes a classifier of one task with a LoRA adapter of random numbers."""

    def classifier(number=0, config=None, base=None, **fields):
        config = config or lora_config(**{"r": 2, "init_lora_weights": False, **fields})
        base = base or load_clip(clip_folder)
        task = make_task(STYLES[number], 3 + number)
        return MultiTaskClassifier(base, processor, [task], config, seed=number).eval()

    return classifier


def updates(classifier):
    """The update of each module's weight, by the name of its matrix A."""
    config, state = classifier.adapter_set.config_of("global"), classifier.adapter_state("global")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return {
        name: scale * (state[name.replace("lora_A", "lora_B")].double() @ a.double()).numpy()
        for name, a in state.items()
        if "lora_A" in name
    }


def ties(matrices, density, weights):
    """Trim, elect sign, disjoint mean: independent of PEFT."""
    kept = []
    for matrix in matrices:
        smallest = np.sort(np.abs(matrix).ravel())[::-1][: int(density * matrix.size)].min()
        kept.append(np.where(np.abs(matrix) >= smallest, matrix, 0.0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agreeing = [np.sign(matrix) == sign for matrix in kept]
    total = sum(weight * matrix * agrees for weight, matrix, agrees in zip(weights, kept, agreeing))
    return total / np.maximum(sum(agrees.astype(int) for agrees in agreeing), 1)


def approximated(matrix, rank):
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def probabilities(classifier, task):
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    return classifier.probabilities(pixels, [task] * 3).detach()


CASES = [
    (1.0, 1.0, 32),  # 32 is the full rank of the text tower
    (0.2, 1.0, 32),
    (0.2, 1.7, 32),
    (0.5, [1.0, 0.5, 2.0], 32),
    (0.2, 1.0, 3),
    (0.2, 1.0, None),
]


@pytest.mark.parametrize(("density", "weights", "rank"), CASES)
def test_the_merged_update_is_the_formula(make, density, weights, rank):
    parts = [make(0), make(1, r=3, lora_alpha=5), make(2, r=4, use_rslora=True)]
    merged = merge_lora(parts, density, weights, rank)
    config = merged.adapter_set.config_of("global")
    assert config.r == (rank or 2 + 3 + 4)
    assert merged.adapter_state("global")[KEY.format("A")].shape == (config.r, VISION_WIDTH)
    scales = weights if isinstance(weights, list) else [weights] * 3
    found = updates(merged)
    assert found.keys() == updates(parts[0]).keys()
    for name, update in found.items():
        expected = approximated(ties([updates(part)[name] for part in parts], density, scales), config.r)
        np.testing.assert_allclose(update, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "fields", [{}, {"lora_alpha": 3}, {"use_rslora": True}, {"r": 5, "rank_pattern": {"q_proj": 1}}]
)
def test_one_adapter_untrimmed_stays_what_it_is(make, fields):
    one = make(config=lora_config(init_lora_weights=False, **fields))
    merged = merge_lora([one], density=1.0)
    torch.testing.assert_close(probabilities(merged, "print"), probabilities(one, "print"), rtol=1e-4, atol=1e-6)


def test_one_adapter_is_trimmed_and_scaled_like_several(make):
    one = make()
    for name, update in updates(merge_lora([one], density=0.3, weights=0.5, rank=32)).items():
        expected = approximated(ties([updates(one)[name]], 0.3, [0.5]), 32)
        np.testing.assert_allclose(update, expected, atol=1e-5 * np.abs(expected).max())


def test_factors_of_the_same_update_give_the_same_merged_update(make):
    first, second, other = make(0), make(1), make(1)
    state, turned = other.adapter_state("global"), torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    for name in [name for name in state if "lora_A" in name]:
        matrix_b = name.replace("lora_A", "lora_B")
        state[name], state[matrix_b] = turned @ state[name], state[matrix_b] @ turned.inverse()
    other.load_adapter_state("global", state)
    found, expected = updates(merge_lora([first, other])), updates(merge_lora([first, second]))
    for name, update in found.items():
        np.testing.assert_allclose(update, expected[name], atol=1e-5)


def test_it_serves_all_tasks_and_the_parts_stay_as_they_are(make, tmp_path):
    parts = [make(number) for number in range(3)]
    before = [{name: tensor.clone() for name, tensor in part.adapter_state("global").items()} for part in parts]
    parts[1].record.zero_shot = {"clipart": 0.25}
    merged = merge_lora(part for part in parts)
    assert merged.adapters == ["global"]
    assert merged.routes == dict.fromkeys(STYLES, ("global",))
    assert [len(task.class_names) for task in merged.tasks.values()] == [3, 4, 5]
    for part, state in zip(parts, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.adapter_state("global").items())
    merged.save_pretrained(tmp_path)
    loaded = MultiTaskClassifier.from_pretrained(tmp_path)
    for style in STYLES:
        assert torch.equal(probabilities(loaded, style), probabilities(merged, style))
    assert loaded.record.settings == {"ties_density": 0.2, "ties_weights": "1.0"}
    assert loaded.record.zero_shot == {"clipart": 0.25}
    with merged.zero_shot(), parts[0].zero_shot():
        assert torch.equal(probabilities(merged, "print"), probabilities(parts[0], "print"))


def test_adapters_of_clip_lora_that_were_saved_are_merged_and_train_on(make, arguments, tmp_path):
    for number in range(2):
        part = make(number, clip_lora_config(init_lora_weights=False))
        part.save_pretrained(tmp_path / STYLES[number])
    merged = merge_lora(MultiTaskClassifier.from_pretrained(tmp_path / style) for style in STYLES[:2])
    for number in range(2):
        merged.tasks[STYLES[number]].train = make_task(STYLES[number], 3 + number).train
        merged.tasks[STYLES[number]].eval = make_task(STYLES[number], 3 + number).eval
    before = merged.adapter_state("global")[KEY.format("A")].clone()
    MultiTaskTrainer(model=merged, args=arguments(max_steps=2)).train()
    assert not torch.equal(merged.adapter_state("global")[KEY.format("A")], before)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "no adapter"),
        (BitFitConfig(), "an adapter of BitFitConfig"),
        (LinearProbeConfig(), "an adapter of LinearProbeConfig"),
        (MmAPConfig(), "an adapter of MmAPConfig"),
        (ia3_config(), "an adapter of IA3Config"),
        (lora_config(use_dora=True), "use_dora=True, so its update is not the product"),
        (lora_config(bias="all"), "bias='all', so its update"),
        (lora_config(init_lora_weights="pissa"), "init_lora_weights='pissa', so its update"),
    ],
    ids=str,
)
def test_adapters_that_are_no_plain_lora(make, processor, clip_folder, config, words):
    base = load_clip(clip_folder)
    other = MultiTaskClassifier(base, processor, [make_task("photo", 3)], config)
    with pytest.raises(ValueError, match=rf"classifiers\[1\] has {words}"):
        merge_lora([make(), other])


def test_parts_that_do_not_fit_together(make):
    cases = {
        "other weights of the base": make(1, base=tiny_clip(seed=3)),
        "LoRA of other modules": make(1, target_modules=r".*q_proj"),
        "would both have the adapter 'print'": make(0),
        "expected a MultiTaskClassifier": "photo",
    }
    for sentence, other in cases.items():
        with pytest.raises(ValueError, match=sentence):
            merge_lora([make(), other])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"density": 0}, "for `density`: expected a finite number above 0 and of at most 1"),
        ({"density": 1.5}, "for `density`"),
        ({"density": "0.2"}, "for `density`"),
        ({"density": 1e-4}, r"density=0.0001 keeps none of the \d+ elements of the smallest update; write 0.0"),
        ({"weights": -1.0}, "for `weights`"),
        ({"weights": [1.0, float("nan")]}, r"for `weights"),
        ({"weights": [1.0, 1.0, 1.0]}, "3 weights were given for 2 classifiers; write one for each"),
        ({"rank": 0}, "for `rank`"),
        ({"rank": 33}, "rank=33 is larger than the smallest of the merged matrices; write 32 or less"),
    ],
)
def test_settings_out_of_range(make, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_lora([make(0), make(1)], **fields)


@pytest.mark.parametrize("wrong", [{"density": 1e-4}, {"rank": 33}])
def test_what_does_not_fit_is_refused_before_the_next_one_is_made(make, wrong):
    made = []
    with pytest.raises(ValueError, match=next(iter(wrong))):
        merge_lora((made.append(number) or make(number) for number in (0, 1)), **wrong)
    assert made == [0]


def test_the_density_that_an_error_names_is_enough(make):
    with pytest.raises(ValueError, match="keeps none") as error:
        merge_lora([make(0), make(1)], density=1e-4)
    found = re.search(r"write (\S+) or more", str(error.value)).group(1)
    merge_lora([make(0), make(1)], density=float(found))


@pytest.mark.parametrize("given", [[], iter(()), None, "folder"])
def test_nothing_to_merge(given):
    with pytest.raises(ValueError, match=r"No classifier was given|for `classifiers`: expected a list"):
        merge_lora(given)
