"""The page of `mmap-peft app`: what it answers, and the page itself in a headless browser."""

import contextlib
import gc
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmap_peft import MmAPConfig, MultiTaskClassifier, load_processor, lora_config
from mmap_peft.commands.app import ANY, choices, classify, make_page
from mmap_peft.data.pictograms import draw

from ..conftest import load_clip, make_task


APP = (sys.executable, "-m", "mmap_peft", "app")
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


@pytest.mark.parametrize("others", ["cat", ",".join(map(str, range(1001))), "cat, cat", "x" * 500 + ", y"])
def test_classes_that_cannot_be_chosen_are_told(others, trained, sun):
    with pytest.raises(ValueError, match=r"Write 2 to 1000 other classes|class_names|write a shorter template"):
        classify(MultiTaskClassifier.from_pretrained(trained), sun, "print", others)


@pytest.fixture
def own_loop():
    """Gradio leaves event loops, which are collected before the next test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.usefixtures("own_loop")
def test_visitors_do_not_disturb_each_other(clip_folder, sun):
    """Adapters that are no prompts are disabled for all threads while one of them asks without."""
    clip, processor = load_clip(clip_folder), load_processor(clip_folder)
    classifier = MultiTaskClassifier(clip, processor, [make_task("print", 3)], lora_config(init_lora_weights=False))
    (asked,) = make_page(classifier, "page").fns.values()
    expected = asked.fn(sun, "print", "")
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(4) as threads:
        assert all(found == expected for found in threads.map(lambda _: asked.fn(sun, "print", ""), range(40)))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.usefixtures("own_loop")
def test_names_of_a_foreign_model_are_shown_as_they_are(clip_folder, sun):
    clip, processor = load_clip(clip_folder), load_processor(clip_folder)
    task = make_task("print", 3, name="![x](http://h/x) <b>")
    classifier = MultiTaskClassifier(clip, processor, [task], MmAPConfig())
    components = make_page(classifier, "*a* & [b](http://c)").config["components"]
    shown = [each["props"].get("value") for each in components if each["type"] == "markdown"]
    assert r"# \*a\* \& \[b\](http<!-- -->://c)" in shown[0]
    classifier.compute_prototypes()
    found = classify(classifier, sun, "")[2]
    assert found == r"Task: !\[x\](http<!-- -->://h/x) \<b\> 100.0 %"


def test_without_gradio_a_sentence_says_what_to_install(trained, call, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    code, _, told = call("app", trained)
    assert code == 2
    assert told.endswith("needs the package gradio, which is missing; write pip install mmap_peft[app].\n")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "{taken}"], r"cannot listen on 127\.0\.0\.1, port \d+ \(Address already in use\); write another"),
        (["--host", "no.such.invalid"], r"cannot listen on no\.such\.invalid \(.+\); write another --host"),
        (["--host", "192.0.2.1"], r"cannot listen on 192\.0\.2\.1 \(Cannot assign requested address\); write"),
        (["--host", "::1"], "'::1' is no name and no IPv4 address; write --host with one, such as 0.0.0.0"),
        (["--port", "0"], "Invalid value 0 for `port`: expected an integer from 1 to 65535"),
        (["--examples", "sun.jgp"], "'sun.jgp' is no file; give pictures, folders of pictures or patterns"),
        (["--examples", "*.nothing"], "holds no image"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, trained, call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, printed, told = call("app", trained, *(each.format(taken=taken.getsockname()[1]) for each in options))
    assert (code, printed, len(told.splitlines())) == (2, "", 1)
    assert re.search(sentence, told)


def test_the_space_serves_the_model_that_its_variable_names(trained, monkeypatch):
    monkeypatch.setenv("MODEL", trained)
    with serving(sys.executable, "-u", SPACE / "app.py") as address, urllib.request.urlopen(address) as page:
        assert trained in page.read().decode()


@contextlib.contextmanager
def serving(*command):
    """The address of a page that a command serves in a process of its own."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        limit = threading.Timer(120, process.kill)  # a page that is never served ends the lines
        try:
            limit.start()
            printed = []
            for line in process.stdout:
                printed.append(line)
                if found := re.search(r"http://[\w.]+:\d+", line):
                    break
            else:
                pytest.fail("".join(printed))
            limit.cancel()
            yield found.group()
        finally:
            limit.cancel()
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
        expect(page.get_by_text("Write 2 to 1000 other classes")).to_be_visible()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
        expect(page.get_by_text("The picture cannot be read: it is no image").first).to_be_visible()
        browser.close()
        assert list(Path(tempfile.gettempdir()).glob("mmap_peft-app-*"))
    assert not list(Path(tempfile.gettempdir()).glob("mmap_peft-app-*"))


def zero_shot(classifier: MultiTaskClassifier, picture: str) -> str:
    with classifier.zero_shot():
        return classifier.predict(picture, "print").labels[0]
