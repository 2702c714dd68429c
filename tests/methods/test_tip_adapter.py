"""Tip-Adapter and Tip-Adapter-F: the published formula, the cache, its scales, files, and other classes."""

import itertools

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPModel

from mmap_peft import LinearProbeConfig, MultiTaskClassifier, MultiTaskTrainer, Task, TipAdapterConfig
from mmap_peft.data.pictograms import draw
from mmap_peft.multitask.task_caches import ALPHAS, BETAS

from ..conftest import make_task


NAMES = ["sun", "cloud", "star", "heart"]
COUNTS = {"print": [3, 1, 2], "photo": [1, 0, 4, 2]}  # training images of each class
PIXELS = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.tensor([1, 0, 1, 0])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def images(style, counts, start=0):
    """The first image of each class, then the second of each that has one, and so on."""
    places = [(n, name) for n in range(max(counts)) for name, count in zip(NAMES, counts) if n < count]
    return [(draw(style, name, start + n), name) for n, name in places]


@pytest.fixture
def make(clip_folder, processor):
    def classifier(filled=True, restricted=False, **fields):
        tasks = [
            Task(
                style,
                NAMES[: len(counts)],
                train=images(style, counts),
                classes_for_training=NAMES[:2] if restricted else None,
            )
            for style, counts in COUNTS.items()
        ]
        made = MultiTaskClassifier(
            CLIPModel.from_pretrained(clip_folder), processor, tasks, TipAdapterConfig(**fields)
        )
        if filled:
            made.fill_caches(batch_size=3)
        return made.eval()

    return classifier


@torch.no_grad()
def features(classifier, pictures):
    pixels = classifier.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return F.normalize(classifier.clip.get_image_features(pixels).pooler_output, dim=-1)


def published(classifier, name, x, keys, labels, alpha, beta):
    """The formula as in the authors' code, with keys (images, dim) and one-hot values."""
    values = F.one_hot(labels, len(classifier.tasks[name].class_names)).float()
    cache_logits = ((-1) * (beta - beta * x @ keys.t())).exp() @ values
    clip_logits = classifier.clip.logit_scale.exp() * x @ classifier.encode_texts([name])[0].t()
    return clip_logits.detach() + cache_logits * alpha


def cache_of(classifier, name):
    """Keys and labels of a task's cache, from its training images, class by class."""
    rows = sorted(images(name, COUNTS[name]), key=lambda row: NAMES.index(row[1]))
    return features(classifier, [image for image, _ in rows]), torch.tensor([NAMES.index(label) for _, label in rows])


# ---- the formula


@pytest.mark.parametrize("scales", [{}, {"alpha": 3.0, "beta": 5.5}], ids=["as published", "others"])
@pytest.mark.parametrize("train_keys", [False, True])
def test_logits_and_gradients_are_the_published_formula(train_keys, scales, make):
    classifier = make(train_keys=train_keys, **scales)
    alpha, beta = scales.get("alpha", 1.17), scales.get("beta", 1.0)
    labels = torch.tensor([2, 0, 3, 1])
    output = classifier(PIXELS, NUMBERS, labels)
    x = F.normalize(classifier.clip.get_image_features(PIXELS).pooler_output, dim=-1).detach()
    loss = 0.0
    for number, name in enumerate(classifier.tasks):
        keys, classes = cache_of(classifier, name)
        keys.requires_grad_(train_keys)
        rows = number == NUMBERS
        expected = published(classifier, name, x[rows], keys, classes, alpha, beta)
        found = output.logits[rows]
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, **CLOSE)
        assert (found[:, expected.shape[1] :] == float("-inf")).all()
        loss = loss + F.cross_entropy(expected, labels[rows], reduction="sum") / len(PIXELS)
        classifier.zero_grad()
        if train_keys:
            classifier(PIXELS, NUMBERS, labels).loss.backward()
            (gradient,) = torch.autograd.grad(F.cross_entropy(expected, labels[rows], reduction="sum"), keys)
            part = classifier.adapter_parameters(name)["keys"]
            filled = part.detach().any(-1)
            torch.testing.assert_close(part.grad[filled], gradient / len(PIXELS), **CLOSE)
            assert not part.grad[~filled].any() and filled.sum(1).tolist() == COUNTS[name]
    torch.testing.assert_close(output.loss, loss, **CLOSE)


def test_an_empty_cache_and_one_of_weight_zero_are_zero_shot(make, clip_folder, processor):
    plain = MultiTaskClassifier(CLIPModel.from_pretrained(clip_folder), processor, make(False).tasks.values()).eval()
    for classifier in make(filled=False), make(alpha=0.0):
        assert torch.equal(classifier(PIXELS, NUMBERS).logits, plain(PIXELS, NUMBERS).logits)
    assert not torch.allclose(make()(PIXELS, NUMBERS).logits, plain(PIXELS, NUMBERS).logits, atol=0.1)


# ---- the cache


def test_filling_does_not_depend_on_batches_and_keeps_what_has_no_images(make):
    classifier = make()
    before = {name: classifier.adapter_state(name)["keys"].clone() for name in COUNTS}
    for name, keys in before.items():
        assert keys.shape == (len(COUNTS[name]), max(COUNTS[name]), 16)
        torch.testing.assert_close(keys.norm(dim=-1).round(), (keys.any(-1)).float())
    classifier.tasks["photo"].train = None
    classifier.tasks["print"].train = images("print", [1, 1, 1])
    classifier.fill_caches(batch_size=100)
    assert torch.equal(classifier.adapter_state("photo")["keys"], before["photo"])
    torch.testing.assert_close(classifier.adapter_state("print")["keys"], before["print"][:, :1])
    assert classifier.trained_adapters == {"print", "photo"}


def test_a_trainer_fills_caches_once_and_trains_keys(make, arguments):
    for train_keys in (False, True):
        classifier, filled = make(filled=False, train_keys=train_keys), make()
        fields = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}
        trainer = MultiTaskTrainer(model=classifier, args=arguments(**fields))
        assert trainer.train().global_step == 2 * train_keys
        for name in COUNTS:  # a step of Adam moves a key by no more than the learning rate
            keys, expected = (each.adapter_state(name)["keys"] for each in (classifier, filled))
            torch.testing.assert_close(keys, expected, atol=3e-3 if train_keys else 1e-6, rtol=0)
            assert torch.allclose(keys, expected, atol=1e-6) != train_keys
            assert torch.equal(keys.any(-1), expected.any(-1))
        old = {name: classifier.adapter_state(name)["keys"].clone() for name in COUNTS}
        classifier.add_task(make_task("sketch", 3))
        MultiTaskTrainer(model=classifier, args=arguments(**fields)).train()
        assert all(torch.equal(classifier.adapter_state(name)["keys"], keys) for name, keys in old.items())
        assert classifier.adapter_state("sketch")["keys"].shape == (3, 2, 16)
        assert classifier.trained_adapters == {"print", "photo", "sketch"}
        if not train_keys:
            with pytest.raises(ValueError, match=r"without train_keys, its caches are filled already; write"):
                trainer.train()


def test_an_optimizer_of_caches_that_were_empty_is_refused(make, arguments):
    args = arguments(max_steps=1, save_strategy="no", learning_rate=1e-3)
    for filled in (False, True):
        classifier = make(filled=filled, train_keys=True)
        optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=1e-3)
        trainer = MultiTaskTrainer(model=classifier, args=args, optimizers=(optimizer, None))
        if filled:
            before = classifier.adapter_state("photo")["keys"].clone()
            trainer.train()
            assert not torch.equal(classifier.adapter_state("photo")["keys"], before)
        else:
            with pytest.raises(ValueError, match="adapters were replaced, filled or set to train after it was made"):
                trainer.train()


def test_classes_that_are_not_trained_have_no_images(make):
    classifier, whole = make(restricted=True), make()
    found, expected = (each.adapter_state("print")["keys"].any(-1).sum(1).tolist() for each in (classifier, whole))
    assert (found, expected) == ([3, 1, 0], [3, 1, 2])
    picture = draw("print", "star", 5)
    for names in (NAMES[:2], NAMES[1:3]):
        found, expected = (each.predict(picture, "print", class_names=names) for each in (classifier, whole))
        same = torch.allclose(found.probabilities, expected.probabilities, atol=1e-6)
        assert same == (names == NAMES[:2])
    loss = make(restricted=True, train_keys=True).train()(PIXELS, NUMBERS, torch.tensor([0, 1, 1, 0])).loss
    assert loss.isfinite() and loss.requires_grad


# ---- its scales


def test_scales_are_those_of_the_authors_search(make):
    classifier = make(alpha=0.5, beta=2.0)
    validation = {"print": images("print", [3, 3, 3], 10), "photo": images("photo", [2, 2, 2, 2], 10)}
    alphas, betas = (0.1, 0.5, 2.0, 10.0), (0.1, 3.0, 6.0)
    found = classifier.choose_cache_scales(validation, alphas, betas, batch_size=4)
    for name, rows in validation.items():
        x = features(classifier, [image for image, _ in rows])
        labels, best = torch.tensor([NAMES.index(label) for _, label in rows]), (-1.0, None)
        for beta, alpha in itertools.product(betas, alphas):
            logits = published(classifier, name, x, *cache_of(classifier, name), alpha, beta)
            accuracy = (logits.argmax(1) == labels).float().mean().item()
            best = max(best, (accuracy, (alpha, beta)), key=lambda each: each[0])
        assert (found[name].alpha, found[name].beta) == best[1]
        assert found[name].accuracy == pytest.approx(best[0])
        state = classifier.adapter_state(name)
        assert (state["alpha"].item(), state["beta"].item()) == pytest.approx(best[1])
    assert len({each[:2] for each in found.values()}) == 2  # each task its own
    assert (len(ALPHAS), len(BETAS), ALPHAS[0], BETAS[0]) == (20, 200, 0.1, 0.1)
    assert (ALPHAS[-1], BETAS[-1]) == pytest.approx((3 - 2.9 / 20, 7 - 6.9 / 200))


# ---- files


@pytest.mark.parametrize("train_keys", [False, True])
def test_a_folder_and_an_onnx_file_give_the_same_answers(train_keys, make, tmp_path):
    classifier, picture = make(train_keys=train_keys), draw("photo", "star", 7)
    classifier.choose_cache_scales({"photo": images("photo", [1, 1, 1, 1], 10)}, [2.5], [4.0])
    classifier.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| alpha | 1.17 (print), 2.5 (photo) |" in card and "| beta | 1.0 (print), 4.0 (photo) |" in card
    assert "hold the features of the training images" in card and ("Nothing was trained." in card) != train_keys
    assert "| alpha | 2.5 |" in (tmp_path / "saved" / "photo" / "README.md").read_text()
    again = MultiTaskClassifier.from_pretrained(tmp_path / "saved")
    fresh = make(filled=False, train_keys=train_keys)
    fresh.load_adapters(tmp_path / "saved")
    expected = classifier.predict(picture, "photo").probabilities
    for other in (again, fresh):
        assert torch.equal(other.predict(picture, "photo").probabilities, expected)
        for name in COUNTS:
            for key, tensor in classifier.adapter_state(name).items():
                assert torch.equal(other.adapter_state(name)[key], tensor)
        assert bool(other.training_adapters) == train_keys
    if train_keys:
        pixels = classifier.processor.image_processor(images=[picture, picture], return_tensors="pt")["pixel_values"]
        session = onnxruntime.InferenceSession(classifier.export("photo", format="onnx", path=tmp_path))
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected.expand(2, -1), **CLOSE)


def test_files_of_other_sizes_change_nothing(make, tmp_path):
    classifier = make()
    classifier.save_pretrained(tmp_path)
    before, path = classifier(PIXELS, NUMBERS).logits, tmp_path / "print" / "adapter_model.safetensors"
    tensors = load_file(path)
    for keys in (tensors["keys"][:2], tensors["keys"][..., :8].contiguous(), tensors["keys"][0]):
        save_file({**tensors, "keys": keys}, path)
        with pytest.raises(ValueError, match=r"holds 'keys' of shape .* need \[3, \d, 16\]; nothing was loaded"):
            classifier.load_adapters(tmp_path, verify=False)
    assert torch.equal(classifier(PIXELS, NUMBERS).logits, before)


# ---- other classes


def test_other_classes_are_told_apart_by_texts_and_own_ones_keep_their_images(make):
    classifier, picture = make(alpha=5.0), draw("photo", "star", 7)
    pixels = classifier.processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    others = ["umbrella", "star"]
    with classifier.zero_shot():
        expected = classifier.predict(picture, "photo", class_names=others).probabilities
        plain = classifier.predict(picture, "photo").probabilities
    found = classifier.predict(picture, ["photo"], class_names=others).probabilities
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(classifier.export("photo", class_names=others)(pixels), expected, **CLOSE)
    whole = classifier.predict(picture, "photo").probabilities
    assert (whole - plain).abs().max() > 0.01
    own = [2, 0]
    part = F.normalize(whole[:, own], p=1, dim=1)
    names = [NAMES[number] for number in own]
    templates = classifier.tasks["photo"].template
    for fields in ({}, {"templates": templates}):
        found = classifier.predict(picture, "photo", class_names=names, **fields).probabilities
        torch.testing.assert_close(found, part, **CLOSE)
        exported = classifier.export("photo", class_names=names, **fields)
        torch.testing.assert_close(exported(pixels), part, **CLOSE)
    mixed = classifier.predict([picture] * 2, ["photo", "print"], class_names=NAMES).probabilities  # new for print
    torch.testing.assert_close(mixed[:1], whole, **CLOSE)
    with classifier.zero_shot():
        torch.testing.assert_close(
            mixed[1:], classifier.predict(picture, "print", class_names=NAMES).probabilities, **CLOSE
        )


# ---- refusals


def test_refusals(make, clip, processor, tasks):
    for name, value in ("alpha", -1.0), ("beta", 0.0), ("train_keys", 1):
        with pytest.raises(ValueError, match=f"for `{name}`"):
            TipAdapterConfig(**{name: value})
    classifier = make(filled=False)
    rows = images("print", [1, 1, 1])
    for given, sentence in (
        (({"print": rows},), r"cache of task 'print' is empty; call fill_caches\(\) or train first"),
        (({"sketch": rows},), "'sketch' is none of the tasks"),
        (({"print": rows}, []), "for `alphas`"),
        (({"print": rows}, [1.0], [-1.0]), "for `betas"),
    ):
        with pytest.raises(ValueError, match=sentence):
            classifier.choose_cache_scales(*given)
    classifier.tasks["photo"].train = None
    with pytest.raises(ValueError, match="Task 'photo' has no training images"):
        classifier.fill_caches()
    assert classifier.adapter_set.empty_caches == ["print", "photo"] and not classifier.trained_adapters
    probe = MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig())
    for attempt in (probe.fill_caches, lambda: probe.choose_cache_scales({})):
        with pytest.raises(ValueError, match="but the classifier is one of LinearProbeConfig; give it TipAdapterC"):
            attempt()
