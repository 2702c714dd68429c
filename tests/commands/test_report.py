"""The report: its numbers, its pictures, and that nothing in it comes from elsewhere."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from mmap_peft import MmAPConfig, MultiTaskClassifier, Task, TaskGrouping
from mmap_peft.commands.report_pictures import confusion_matrix, points


class Page(HTMLParser):
    """The addresses, tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.texts = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def pictures(self):
        data = [base64.b64decode(address.partition(",")[2]) for address in self.addresses]
        return [Image.open(io.BytesIO(each)) for each in data]


def test_the_page_has_every_part_and_needs_no_other_file(call, trained, pictures, tmp_path):
    output = tmp_path / "report.html"
    code, printed, _ = call("report", trained, "--data", pictures, "--output", output, "--mistakes", 2)
    assert (code, printed) == (0, f"{output}\n")
    text = output.read_text()
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object"}
    call("evaluate", trained, pictures, "--output", tmp_path / "found.json")
    accuracy = json.loads((tmp_path / "found.json").read_text())["accuracy"]
    wrong = {name: round(3 * (1 - accuracy[f"{name}_accuracy"])) for name in ("photo", "print")}
    for name, count in wrong.items():
        assert f"<h2>Task {name}</h2>" in text
        assert f"{count} of 3 images are taken for another class" in text
    shown = sum(min(count, 2) for count in wrong.values())
    assert text.count("<figure>") == shown
    grouping = MultiTaskClassifier.from_pretrained(trained).grouping
    assert len(page.pictures) == shown + 2 + (grouping.similarity is not None) + 1  # matrices, heat map, curves
    assert all(min(picture.size) > 20 for picture in page.pictures)


NASTY = "<i>'&$a$ {{7}}"  # as a class name it is clean


def test_names_are_shown_as_they_are(call, clip, processor, tmp_path):
    learns = [Task(NASTY, [NASTY, "cloud"], template="{}"), Task("photo", ["sun", "cloud"])]
    classifier = MultiTaskClassifier(clip, processor, learns, MmAPConfig(num_prompts=4, source_shape=(2, 4)))
    matrices, names = np.array([np.eye(2), np.ones((2, 2))]), list(classifier.tasks)
    classifier.set_grouping(TaskGrouping(names, [[name] for name in names], matrices.mean(0), matrices))
    classifier.record.settings, classifier.record.command = {NASTY: NASTY}, NASTY
    classifier.save_pretrained(tmp_path / "model")
    for name in (NASTY, "cloud"):
        (tmp_path / NASTY / name).mkdir(parents=True)
        Image.new("RGB", (200, 90), (90, 10, 0)).save(tmp_path / NASTY / name / "0.png")  # one of the two is wrong
    assert call("report", tmp_path / "model", "--data", tmp_path / NASTY, "--task", NASTY)[0] == 0
    page = Page((tmp_path / "model" / "report.html").read_text())
    assert "i" not in page.tags
    assert page.texts.count(NASTY) >= 6  # accuracy, mistake, class, setting and value, command
    assert f"{NASTY}/0.png" in page.texts or "cloud/0.png" in page.texts
    assert [max(picture.size) == 112 for picture in page.pictures] == [True, False, False]


def test_without_data_it_tells_what_the_folder_knows(call, trained, tmp_path, monkeypatch):
    for name in ("heat_map", "training_curves"):  # they were drawn above
        monkeypatch.setattr(f"mmap_peft.commands.report.{name}", lambda _, name=name: f"data:image/png;base64,{name}")
    assert call("report", trained, "--output", tmp_path / "report.html")[0] == 0
    text = (tmp_path / "report.html").read_text()
    results = json.loads(Path(trained, "results.json").read_text())
    assert f"took {results['seconds']} s." in text
    assert f"{100 * results['accuracy']['print']['trained']:.1f} %" in text
    assert "base64,heat_map" in text and "base64,training_curves" in text
    assert "<h2>Task" not in text
    assert "write <code>mmap-peft report MODEL --data FOLDER</code>" in text


def test_a_matrix_of_many_classes_stays_small():
    data = base64.b64decode(confusion_matrix(np.eye(70, dtype=int), [f"class ${n}$" for n in range(70)])[22:])
    assert max(Image.open(io.BytesIO(data)).size) < 1300


def test_curves_leave_out_what_is_no_number():
    logs = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": "x"}, {"loss": 1.0}]
    assert points(logs, "loss") == ([1], [2.0])
