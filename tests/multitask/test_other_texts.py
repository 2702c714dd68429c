"""Other classes and templates at prediction: what is kept of them, what is refused, and what is exported."""

import threading

import pytest
import torch

from mmap_peft import TaskGrouping
from mmap_peft.multitask.text_features import TextFeatureCache
from mmap_peft.tuner.fingerprint import Fingerprint

from .test_other_classes import BOUND, IMAGES, OTHERS, make


@pytest.fixture
def mmap(clip, processor):
    classifier = make(clip, processor, "mmap")
    classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))
    return classifier


# ---- the cache


def test_texts_are_encoded_once_and_again_after_training(mmap, monkeypatch):
    calls, encode = [], mmap._encode
    monkeypatch.setattr(mmap, "_encode", lambda tasks, *a, **k: calls.append(list(tasks)) or encode(tasks, *a, **k))
    first = mmap.predict(IMAGES, "photo", class_names=OTHERS).probabilities
    assert torch.equal(mmap.predict(IMAGES, "photo", class_names=OTHERS).probabilities, first)
    assert calls == [["photo"]]
    mmap.predict(IMAGES, ["photo", "print", "print"], class_names=OTHERS)
    assert calls == [["photo"], ["print"]]
    known = len(mmap.texts._ids)
    mmap.predict(IMAGES, "photo", class_names=OTHERS, templates="my {}")
    assert len(mmap.texts._ids) == known
    with mmap.zero_shot():
        assert not torch.equal(mmap.predict(IMAGES, "photo", class_names=OTHERS).probabilities, first)
    with torch.no_grad():
        for parameter in mmap.adapter_parameters("photo").values():
            parameter.data.mul_(1.5)
    assert not torch.equal(mmap.predict(IMAGES, "photo", class_names=OTHERS).probabilities, first)
    assert len(calls) == 5


def test_many_texts_are_encoded_in_parts(mmap):
    rows, project = [], mmap.clip.text_projection
    hook = project.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    chosen = {"class_names": OTHERS, "templates": ["a {}", "the {}", "one {}"]}
    expected = mmap.predict(IMAGES, "photo", **chosen).probabilities
    mmap._other_texts.clear()
    mmap.text_chunk = 4
    found = mmap.predict(IMAGES, "photo", **chosen).probabilities
    hook.remove()
    assert rows == [9, 3, 3, 3]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_cache_is_limited_and_keeps_what_was_used_last():
    cache, encoded = TextFeatureCache(largest=20), []

    def read(*keys, size=4):
        def encode(names):
            encoded.extend(names)
            return [torch.full((size,), float(ord(name))) for name in names]

        found = cache(dict(zip(keys, keys)), Fingerprint([]), encode)
        assert [each[0].item() for each in found] == [ord(key) for key in keys]

    for key in "abcdeaf":  # b is removed
        read(key)
    assert encoded == list("abcdef")
    read("c", "a", "f")
    assert encoded == list("abcdef")
    read("b")
    assert encoded == list("abcdefb")
    read("z", size=21)
    read("z", size=21)  # too large to be kept
    assert encoded == list("abcdefbzz")
    assert not cache._kept[1]


def test_threads_that_ask_for_different_classes(mmap):
    lists = [[f"{name} {number}" for name in ("sun", "moon", "star")] for number in range(6)]
    expected = [mmap.predict(IMAGES, "photo", class_names=names).probabilities for names in lists]
    plain, wrong = mmap.predict(IMAGES, "photo").probabilities, []
    mmap._other_texts.largest = 3 * 16 * 2  # two of the lists

    def work(seed):
        for turn in range(6):
            number = (seed + turn) % len(lists)
            found = mmap.predict(IMAGES, "photo", class_names=lists[number]).probabilities
            if not torch.allclose(found, expected[number], atol=1e-6):
                wrong.append(number)
            if not torch.equal(mmap.predict(IMAGES, "photo").probabilities, plain):
                wrong.append("plain")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- wrong input


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"class_names": "sun"}, r"'sun' for `class_names`: expected a list of strings"),
        ({"class_names": 5}, "5 for `class_names`: expected a list"),
        ({"class_names": {"sun", "star"}}, "`class_names`: expected a list"),
        ({"class_names": ["sun", 5]}, r"5 for `class_names\[1\]`: expected a list of strings"),
        ({"class_names": []}, r"\[\] for `class_names`: expected a list of strings, two or more"),
        ({"class_names": ["sun"]}, r"\['sun'\] for `class_names`: expected a list of strings, two or more"),
        ({"class_names": ["sun", "Sun "]}, "in `class_names` are the same or empty after cleaning: 'sun', 'Sun '"),
        ({"class_names": ["sun", "_"]}, "in `class_names` are the same or empty after cleaning: '_'"),
        ({"class_names": ["sun", "\ud800"]}, "expected a list of strings"),
        (
            {"class_names": ["sun", "very " * 30]},
            "of task 'photo' has 127 tokens .* the text tower has 20 positions",
        ),
        ({"templates": "a photo"}, "Template 'a photo' in `templates` must hold {} once"),
        ({"templates": ["a {}", "{} {}"]}, "Template '{} {}' in `templates` must hold {} once"),
        ({"templates": []}, "for `templates`: expected a string with {}"),
        ({"templates": 5}, "5 for `templates`: expected a string with {}"),
        ({"templates": "very " * 30 + "{}"}, "of task 'photo' has 123 tokens"),
    ],
)
def test_wrong_names_and_templates_stop_with_a_sentence(fields, sentence, mmap):
    before = mmap.predict(IMAGES, "photo").probabilities
    with pytest.raises(ValueError, match=sentence):
        mmap.predict(IMAGES, "photo", **fields)
    assert torch.equal(mmap.predict(IMAGES, "photo").probabilities, before)
    with pytest.raises(ValueError, match=sentence):
        mmap.export("photo", **fields)


@pytest.mark.parametrize(
    ("method", "sentence"), [("coop", "or give templates with 2 words"), ("coop, name in front", "cannot have around")]
)
def test_prompts_that_replace_words_need_templates_with_words(method, sentence, clip, processor):
    classifier = make(clip, processor, method)
    with pytest.raises(ValueError, match=f"Prompts of task 'print' replace 2 words of a text, .*{sentence}"):
        classifier.predict(IMAGES, "print", templates=["a photo of a {}.", "a {}"])


# ---- export


@pytest.mark.parametrize("method", ["zero-shot", "mmap", "lora", "bottleneck", "linear probe", "contexts of classes"])
def test_an_exported_task_has_the_classes_that_were_chosen(method, clip, processor):
    classifier = make(clip, processor, method)
    chosen = (
        {"class_names": ["star", "sun"]}
        if method in BOUND
        else {"class_names": OTHERS, "templates": ["a {}", "my {}"]}
    )
    served = classifier.export("photo", **chosen)
    pixels = processor.image_processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    expected = classifier.predict(IMAGES, "photo", **chosen).probabilities
    torch.testing.assert_close(served(pixels), expected, atol=1e-5, rtol=1e-4)
    assert served.class_names == chosen["class_names"]
