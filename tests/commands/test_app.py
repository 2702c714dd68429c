"""The page of `mmap-peft app`: what it answers, and the page itself in a headless browser."""

import contextlib
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mmap_peft import MmAPConfig, MultiTaskClassifier, load_processor, lora_config
from mmap_peft.commands.app import ANY, choices, classify
from mmap_peft.data.pictograms import draw

from ..conftest import load_clip, make_task


APP = (sys.executable, "-u", "-m", "mmap_peft", "app")
SPACE = Path(__file__).parents[2] / "examples" / "space"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def sun(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("sun") / "sun.png"
    draw("print", "sun", 77).save(file)
    return str(file)


def shares(prediction, classes) -> dict[str, float]:
    return dict(zip(classes, prediction.probabilities[0].tolist()))


def test_an_answer_is_that_of_the_class_with_and_without_training(trained, sun):
    classifier, classes = MultiTaskClassifier.from_pretrained(trained), ["cloud", "star", "sun"]
    assert choices(classifier) == [ANY, ("photo", "photo"), ("print", "print")]
    with_training = classifier.predict(sun, "print")
    with classifier.zero_shot():
        without = classifier.predict(sun, "print")
    assert classify(classifier, sun, "print") == (shares(with_training, classes), shares(without, classes), "")
    assert shares(with_training, classes) != shares(without, classes)
    routed = classifier.predict(sun)
    found, _, told = classify(classifier, sun, "")
    assert found == shares(routed, routed.class_names)
    assert re.fullmatch(rf"Task: {routed.tasks[0]} \d+\.\d %(, \w+ \d+\.\d %)?", told)
    found, without, _ = classify(classifier, sun, "print", " cat, ,dog ")
    assert found == shares(classifier.predict(sun, "print", class_names=["cat", "dog"]), ["cat", "dog"])
    assert list(without) == ["cat", "dog"]
    assert classify(classifier, None, "print") == (None, None, "")


@pytest.mark.parametrize("config", [MmAPConfig(), lora_config()], ids=["mmap", "lora"])
def test_a_classifier_without_prototypes_is_asked_with_a_task(config, clip_folder, sun):
    clip, processor = load_clip(clip_folder), load_processor(clip_folder)
    classifier = MultiTaskClassifier(clip, processor, [make_task("print", 3)], config)
    assert choices(classifier) == [("print", "print")]
    before = classifier.predict(sun, "print").probabilities
    classify(classifier, sun, "print")
    assert classifier.predict(sun, "print").probabilities.equal(before)  # zero-shot leaves nothing behind


@pytest.mark.parametrize(
    ("others", "sentence"), [("cat", "`class_names`"), ("cat, cat", "class_names"), ("x" * 500, "class_names")]
)
def test_classes_that_cannot_be_chosen_are_told(others, sentence, trained, sun):
    with pytest.raises(ValueError, match=sentence):
        classify(MultiTaskClassifier.from_pretrained(trained), sun, "print", others)


def test_without_gradio_a_sentence_says_what_to_install(trained, call, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    code, _, told = call("app", trained)
    assert code == 2
    assert told.endswith("needs the package gradio, which is missing; write pip install mmap_peft[app].\n")


def test_a_port_in_use_is_told(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = subprocess.run([*APP, trained, "--port", port], capture_output=True, text=True)
    assert found.returncode == 2
    assert f"mmap-peft app: Port {port} is in use; write another --port.\n" in found.stderr


def test_the_space_serves_the_model_that_its_variable_names(trained, monkeypatch):
    monkeypatch.setenv("MODEL", trained)
    with serving(sys.executable, SPACE / "app.py") as address, urllib.request.urlopen(address) as page:
        assert trained in page.read().decode()


@contextlib.contextmanager
def serving(*command):
    """The address of a page that a command serves in a process of its own."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if found := re.search(r"http://[\w.]+:\d+", line):
                    break
            else:
                pytest.fail("".join(printed))
            yield found.group()
        finally:
            process.terminate()


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_in_a_browser(trained, sun, tmp_path):
    """A visitor drops a picture, chooses a task, writes other classes, and drops what is no picture."""
    from playwright.sync_api import expect, sync_playwright

    classifier = MultiTaskClassifier.from_pretrained(trained)
    routed, given = classifier.predict(sun), classifier.predict(sun, "print")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with serving(*APP, trained, "--examples", sun) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(address)
        best = page.get_by_test_id("label-output-value")
        page.locator("input[type=file]").first.set_input_files(sun)
        expect(best.first).to_have_text(routed.labels[0])
        expect(page.get_by_text(re.compile(rf"^Task: {routed.tasks[0]} "))).to_be_visible()
        page.get_by_label("Task").click()
        page.get_by_role("option", name="print").click()
        expect(page.get_by_text(re.compile("^Task: "))).to_be_hidden()
        expect(best).to_have_text([given.labels[0], zero_shot(classifier, sun)])
        page.get_by_role("tab", name="Groups").click()
        expect(page.get_by_alt_text("Affinity of the tasks")).to_be_visible()
        page.screenshot(path=tmp_path / "page.png")
        page.get_by_label("Other classes").fill("cat")
        page.get_by_label("Other classes").press("Enter")
        expect(page.get_by_text("two or more")).to_be_visible()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
        expect(page.get_by_text("The picture cannot be read: it is no image").first).to_be_visible()
        browser.close()


def zero_shot(classifier: MultiTaskClassifier, picture: str) -> str:
    with classifier.zero_shot():
        return classifier.predict(picture, "print").labels[0]
