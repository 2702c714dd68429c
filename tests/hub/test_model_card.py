"""The card of a classifier: its metadata as the Hub reads them, and its text as a reader sees it."""

import json
from html import escape

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import CLIPModel

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, MultiTaskTrainingArguments, Task, TaskGrouping
from mmap_peft.multitask.saving import model_card

from ..conftest import load_clip


CONFIG = MmAPConfig(num_prompts=4, source_shape=(2, 4))
NASTY = "a|b `c` *d* _e_ <b>f</b> $g$ [h](i) \\| \n\n---\nj: 'k' \"l\" #"
PLAIN = " ".join(NASTY.split())


@pytest.fixture
def classifier(clip, processor, tasks):
    return MultiTaskClassifier(clip, processor, tasks, CONFIG)


def read(card, path):
    """The metadata and text of a card as `huggingface_hub` reads it from a file."""
    card.save(path)
    return ModelCard.load(path)


def tables(text):
    """All tables of a text, as rows of what a reader sees in the cells."""
    found, tokens = [], MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            inline = tokens[number + 1]
            assert all(child.type in ("text", "text_special") for child in inline.children), inline.content
            found[-1][-1].append("".join(child.content for child in inline.children))
    return found


def test_an_untrained_classifier_has_a_card_without_gaps(classifier, tmp_path):
    card = read(model_card(classifier), tmp_path / "README.md")
    assert card.data.library_name == "mmap_peft"
    assert card.data.license is None
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.eval_results is None
    assert card.data.datasets is None
    assert tables(card.text)[0] == [
        ["task", "classes", "adapters"], ["print", "3", "global"], ["clipart", "5", "global"], ["photo", "4", "global"]
    ]  # fmt: skip
    for absent in ("More Information Needed", "None", "## Training", "## Groups"):
        assert absent not in card.text
    assert 'from_pretrained("your-name/your-repository"' in card.text


def test_accuracies_are_in_the_metadata_and_in_the_table(classifier, tmp_path):
    for task in classifier.tasks.values():
        task.dataset = "me/pictograms"
    classifier.record.zero_shot = {"print": 0.25, "clipart": 0.5, "photo": 0.3}
    classifier.record.prompted = {"print": 0.5, "clipart": 0.75, "photo": 0.4}
    card = read(model_card(classifier, "me/clip-pictograms"), tmp_path / "README.md")
    assert card.data.datasets == ["me/pictograms"]
    assert card.data.model_name == "clip-pictograms"
    found = {(result.dataset_config, result.metric_name): result for result in card.data.eval_results}
    assert {key: result.metric_value for key, result in found.items()} == {
        ("print", "accuracy"): 0.5,
        ("clipart", "accuracy"): 0.75,
        ("photo", "accuracy"): 0.4,
        ("mean of the tasks", "mean accuracy"): pytest.approx(0.55),
    }
    assert {result.dataset_type for result in found.values()} == {"me/pictograms"}
    head, *rows = tables(card.text)[0]
    assert head[-2:] == ["zero-shot", "with prompts"]
    assert [row[-2:] for row in rows] == [
        ["25.0 %", "50.0 %"], ["50.0 %", "75.0 %"], ["30.0 %", "40.0 %"], ["35.0 %", "55.0 %"]
    ]  # fmt: skip


def test_a_mean_is_one_of_all_tasks_or_none(classifier, tmp_path):
    classifier.record.prompted = {"print": 0.5, "photo": 0.4}
    card = read(model_card(classifier), tmp_path / "README.md")
    assert [result.dataset_config for result in card.data.eval_results] == ["print", "photo"]
    assert [row[-1] for row in tables(card.text)[0][1:]] == ["50.0 %", "", "40.0 %", ""]


def test_names_that_mean_something_to_markdown_or_yaml_are_shown_as_they_are(clip, processor, tmp_path):
    tasks = [Task(NASTY, ["x|y", "`z`\nw"], dataset=NASTY), Task("plain", ["sun", "moon"], template="{} | `a`")]
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))
    classifier.record.prompted = {NASTY: 0.5, "plain": 0.25}
    classifier.record.settings = {"template": NASTY}
    card = read(model_card(classifier, "me/nasty"), tmp_path / "README.md")
    assert card.data.eval_results[0].dataset_config == PLAIN
    assert card.data.eval_results[0].dataset_type == PLAIN
    adapter = tasks[0].adapter
    task_table, groups, prompts, settings = tables(card.text)
    assert task_table[1:] == [
        [PLAIN, "2", f"group_0 + {adapter}", "50.0 %"], ["plain", "2", "group_0 + plain", "25.0 %"],
        ["mean", "", "", "37.5 %"],
    ]  # fmt: skip
    assert groups[1:] == [["group_0", f"{PLAIN}, plain"]]
    assert {len(row) for row in prompts} == {2}
    assert settings[1:] == [["template", PLAIN]]
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert "<b>" not in html
    assert "x|y, `z` w" in html
    code = card.text.split("```python\n")[1].split("\n```")[0]
    assert compile(code, "card", "exec")
    assert json.dumps(NASTY) in code


@pytest.mark.parametrize(
    "name", ["{{ 7 * 6 }}", "{% raw %}", "{# gone #}", "<script>", "&lt;", "a|b", "\\|", "%s {0}"]
)
def test_names_that_mean_something_to_the_template_or_to_html_are_shown_as_they_are(name, clip, processor, tmp_path):
    tasks = [Task("print", [f"sun {name}", "moon"]), Task(f"photo {name}", ["sun", "moon"])]
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIG)
    classifier.record.settings = {f"argument {name}": name}
    classifier.record.versions = {"torch": name}
    classifier.record.command = f"mmap-peft train {name}"
    card = read(model_card(classifier), tmp_path / "README.md")
    task_table, _, training = tables(card.text)
    assert task_table[2][0] == f"photo {name}"
    assert training[1] == [f"argument {name}", name]
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert f'<code class="language-bash">mmap-peft train {escape(name)}' in html
    assert f"Classes of print: sun {escape(name)}, moon. Text of a class: “a photo of a {{}}.”" in html
    assert f"Environment: torch {escape(name)}." in html


def test_a_card_of_mmap_says_what_to_cite(classifier):
    assert "@inproceedings{xin2024mmap," in model_card(classifier).text


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch16", "local"])
def test_the_base_is_named_if_it_has_a_name_and_no_path_is_told(name, classifier, clip_folder, tmp_path):
    hub = name != "local"
    classifier.clip.name_or_path = name if hub else clip_folder
    card = read(model_card(classifier), tmp_path / "README.md")
    assert card.data.base_model == (name if hub else None)
    assert card.data.to_dict().get("base_model_relation") == ("adapter" if hub else None)
    assert clip_folder not in card.content
    assert (f"(https://huggingface.co/{name})" in card.text) == hub
    assert ("model=base" in card.text) != hub
    assert f"for {name if hub else clip_folder.split('/')[-1]}" in card.text


def test_trained_parameters_are_counted_once(classifier, tmp_path):
    text = model_card(classifier).text
    base = sum(parameter.numel() for parameter in CLIPModel(classifier.clip.config).parameters())
    count = sum(parameter.numel() for parameter in classifier.adapter_parameters("global").values())
    assert f"One adapter holds {count:,} trained parameters, {100 * count / base:.3g} % of the base." in text


@pytest.fixture
def trainer(classifier, arguments):
    return MultiTaskTrainer(model=classifier, args=arguments(max_steps=2, learning_rate=0.5, grouping_threshold="0.1"))


def test_a_trainer_records_what_the_card_tells(trainer, classifier, tmp_path):
    with classifier.zero_shot():
        before = trainer.evaluate(metric_key_prefix="zero_shot")
    trainer.train()
    after = trainer.evaluate()
    record = classifier.record
    for name, task in classifier.tasks.items():
        assert record.zero_shot[name] == before[f"zero_shot_{task.adapter}_accuracy"]
        assert record.prompted[name] == after[f"eval_{task.adapter}_accuracy"]
    assert record.settings == {
        "seed": 42, "per_device_train_batch_size": 6, "max_steps": 2, "learning_rate": 0.5, "grouping_steps": 4,
        "grouping_snapshots": 2, "snapshot_images": 6, "grouping_threshold": "0.1",
    }  # fmt: skip
    assert {"mmap_peft", "python", "torch", "peft"} < set(record.versions)
    trainer.create_model_card()
    card = read(model_card(classifier), tmp_path / "README.md")
    assert (tmp_path / "out" / "README.md").read_text() == card.content
    mean = {result.metric_name: result.metric_value for result in card.data.eval_results}["mean accuracy"]
    assert mean == pytest.approx(after["eval_mean_accuracy"])
    assert "grouping.png" in card.text
    assert str(tmp_path) not in card.content


def test_a_card_after_loading_is_the_same(trainer, classifier, tmp_path):
    trainer.train()
    trainer.evaluate()
    classifier.save_pretrained(tmp_path / "saved")
    again = MultiTaskClassifier.from_pretrained(tmp_path / "saved")
    assert again.record == classifier.record
    assert model_card(again).content == model_card(classifier).content
    cards = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.md")}
    assert cards == {"README.md", *(f"{adapter}/README.md" for adapter in classifier.adapters)}
    assert (tmp_path / "saved" / "README.md").read_text() == model_card(classifier).content


def test_accuracies_do_not_outlive_the_weights(trainer, classifier):
    trainer.train()
    trainer.evaluate()
    assert classifier.record.prompted
    trainer.args.max_steps = 3
    trainer.train()
    assert not classifier.record.prompted
    trainer.evaluate()
    classifier.share_one_adapter()
    assert not classifier.record.prompted


def test_accuracies_on_other_images_are_not_recorded(trainer, classifier):
    trainer.evaluate(trainer.train_dataset)
    assert not classifier.record.prompted


def test_a_record_comes_along_with_loaded_adapters(trainer, classifier, clip_folder, processor, tasks, tmp_path):
    trainer.train()
    trainer.evaluate()
    classifier.save_pretrained(tmp_path / "saved")
    fresh = MultiTaskClassifier(load_clip(clip_folder), processor, tasks, CONFIG)
    fresh.load_adapters(tmp_path / "saved")
    assert fresh.record == classifier.record


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_states_of_the_optimizer_are_not_pushed(strategy):
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would upload .* write 'every_save' or 'end'"):
        MultiTaskTrainingArguments(push_to_hub=True, hub_strategy=strategy)
