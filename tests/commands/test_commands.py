"""Every command with good and bad input, in this process."""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainingArguments, starting_learning_rate
from mmap_peft.commands import reading
from mmap_peft.commands.parsing import CommandParser
from mmap_peft.commands.train import TrainArguments, command_line
from mmap_peft.commands.training import TrainingData
from mmap_peft.data.domains import read_folder
from mmap_peft.methods.by_name import METHODS
from mmap_peft.prompts.base import PromptConfig
from mmap_peft_cli import COMMANDS

from .conftest import QUIET, draw_folder


def test_help_and_version_import_no_torch():
    code = (
        "import sys\nfrom mmap_peft_cli import main\n"
        "assert [main(['--help']), main([]), main(['--version'])] == [0, 0, 0]\n"
        "print(sorted({'torch', 'transformers', 'mmap_peft'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in found for name in COMMANDS)
    assert found.endswith("mmap_peft 0.1.0\n[]\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen(name, call):
    code, page, _ = call(name, "--help")
    lines = page.splitlines()
    assert code == 0
    assert lines[0].startswith(f"usage: mmap-peft {name} ")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_all_arguments_of_training_are_one_option_away(call):
    code, page, _ = call("train", "--help-all")
    assert code == 0
    for name in ("--shots", "--grouping_snapshots", "--lr_scheduler_type", "--hub_model_id"):
        assert f"\n  {name} " in page
    assert "--grouping_snapshots" not in call("train", "--help")[1]


BAD = [  # arguments, and what the sentence says; {} is a trained model, [] its pictures, and () an empty folder
    (["trian"], "'trian' is no command; did you mean 'train'?"),
    (["train"], "DATA is missing; write the path of a folder of images"),
    (["train", "[]", "--shot", "1"], "There is no argument --shot; did you mean --shots?"),
    (["train", "[]", "--seed", "x"], "Argument --seed: invalid int value: 'x'; mmap-peft train --help"),
    (["train", "[]", "--shots", "1", "--fraction", "0.5"], "Give either fraction or shots"),
    (["train", "[]", "--shots", "1", "--split_dir", "x"], "write --fraction with --split_dir, not --shots"),
    (["train", "[]", "--shots", "5"], "No image of 'photo' is left to evaluate on"),
    (["train", "[]", "--output_dir", "{}"], "holds a trained model; write another --output_dir, or --overwrite"),
    (["train", "[]", "--model", "no/such"], "'no/such' is no folder here, and the Hub gives no CLIP of this name"),
    (["train", "no/such"], "'no/such' is no folder here, and the Hub gives no data set of this name"),
    (["train", "./no such"], "'./no such' is no folder of images: neither a folder that exists nor a name"),
    (["train", "()"], "no image"),
    (
        ["train", "[]", "--method", "adapter"],
        "'adapter' is no method; write one of mmap, coop, vpt,",
    ),
    (
        ["train", "[]", "--method", "lora", "--num_prompts", "2"],
        "--num_prompts 2 is no setting of lora; leave it out",
    ),
    (["train", "[]", "--config", '{"dept": 2}'], "did you mean 'depth'"),
    (
        ["train", "[]", "--config", '{"num_prompts": 4}', "--num_prompts", "2"],
        "--num_prompts 2 is in --config as well",
    ),
    (["train", "[]", "--config", "depth"], "for `config`: expected settings such as"),
    (["train", "[]", "--config", "{depth: "], "for `config`: expected settings such as"),
    (["train", "[]", "--config", '{"depth": "deep"}'], "for `depth`"),
    (["train", "no.yaml"], "no.yaml: No such file or directory."),
    (["predict", "{}"], "FILES is missing; mmap-peft predict --help shows the arguments."),
    (["predict", "()", "x.png"], "holds no readable tasks.json"),
    (["predict", "{}", "x.png", "--task", "sketch"], "'sketch' is none of the tasks; write one of photo, print"),
    (["predict", "{}", "*.nothing"], "'*.nothing' holds no image; give files, folders of images or patterns."),
    (["predict", "{}", "x.png", "--top", "0"], "Invalid value 0 for `top`: expected an integer"),
    (["predict", "{}", "x.png", "--format", "xml"], "Argument --format: invalid choice: 'xml'"),
    (["evaluate", "{}"], "DATA is missing"),
    (["evaluate", "{}", "[]/print", "--task", "sketch"], "'sketch' is none of the tasks"),
    (["evaluate", "{}", "no/such"], "the Hub gives no data set of this name"),
    (["report", "{}", "--data", "[]", "--mistakes", "-1"], "Invalid value -1 for `mistakes`"),
    (["export", "{}"], "The model has several tasks; write --task with one of photo, print."),
    (["export", "{}", "--task", "print", "--output", "x.png"], "let it end in '.onnx'"),
    (["info", "no/such"], "no/such"),
    (["card", "()"], "holds no readable tasks.json"),
    (["push", "{}"], "REPO_ID is missing"),
    (["push", "{}", "a b"], "'a b' is neither a folder nor the name of a repository"),
]


@pytest.mark.parametrize(("argv", "expected"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(argv, expected, call, trained, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"{}": trained, "[]": pictures, "()": "empty"}
    before = {path: path.stat().st_mtime_ns for path in Path(trained).rglob("*")}
    argv = [next((each.replace(key, place) for key, place in places.items() if key in each), each) for each in argv]
    code, printed, told = call(*argv)
    (line,) = [line for line in told.splitlines() if line.startswith("mmap-peft")]
    assert (code, printed) == (2, "")
    assert expected in line
    assert {path: path.stat().st_mtime_ns for path in Path(trained).rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"empty", "out"}


def test_debug_shows_where_an_error_comes_from(call):
    code, _, told = call("info", "./no such", "--debug")
    assert code == 2
    assert told.startswith("Traceback")
    assert "in read_model" in told


# ---- train


def test_training_says_what_it_did_and_the_command_of_the_card_trains_the_same(
    call, pictures, clip_folder, trained, tmp_path
):
    """From a file, whose seed the line replaces. Of 5 pictures of a class 4 train, and 1 is held out."""
    command = json.loads(Path(trained, "tasks.json").read_text())["training"]["command"].split()
    settings = {name[2:]: yaml.safe_load(value) for name, value in zip(command[3::2], command[4::2])}
    assert (command[:3], settings["seed"]) == (["mmap-peft", "train", "pictures"], 42)
    settings |= {"model": clip_folder, "data": pictures, "output_dir": str(tmp_path / "out"), "seed": 3}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    code, printed, told = call("train", tmp_path / "settings.yaml", *QUIET, "--seed", 42)
    assert code == 0
    assert "photo: 15 images of 3 classes; 12 train, 3 are held out to evaluate." in told
    assert "How the images were split: fraction 0.7, seed 42." in told
    assert "| task | zero-shot | trained | gain |" in printed
    assert printed.endswith(f"Next: mmap-peft predict {tmp_path / 'out'} image.jpg\n")
    for name in ("split.json", "results.json", "trainer_state.json", "prototypes.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    for name in ("print", "photo", "group_0"):
        file = Path(name, "adapter_model.safetensors")
        assert (tmp_path / "out" / file).read_bytes() == (trained / file).read_bytes()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"probe": true, "probe_scale": 1e-3}', {"probe": True, "probe_scale": 1e-3}),
        ('{"init_std": 5e-05}', {"init_std": 5e-05}),
        ({"probe": True, "init_std": 0.00005}, {"probe": True, "init_std": 5e-05}),  # of a YAML file
        (None, {}),
    ],
)
def test_settings_of_a_method_as_json_and_in_a_file(config, expected):
    found = TrainingData(config=config).method_config()
    assert found == MmAPConfig(**expected)
    for wrong in ("3", "true", "[a]", "text"), (3, True, ["a"], "text"):
        for each in wrong:
            with pytest.raises(ValueError, match="for `config`: expected settings such as"):
                TrainingData(config=each).method_config()
    with pytest.raises(ValueError, match="is no method; write one of mmap"):
        TrainingData(method=["lora"]).method_config()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_predicts(method, call, pictures, clip_folder, tmp_path):
    settings = {"promptsrc": '{"depth": 2}', "mmrl_tokens": '{"first_layer": 1}', "mmap": '{"probe": true}'}
    words = ["--model", clip_folder, "--method", method, "--output_dir", tmp_path / "out", "--max_steps", 1]
    words += ["--config", settings[method]] if method in settings else []
    code, printed, told = call("train", pictures, *words, *QUIET)
    assert code == 0, told
    assert "Trained: " in printed
    classifier = MultiTaskClassifier.from_pretrained(tmp_path / "out")
    assert classifier.adapter_config.peft_type == METHODS[method]().peft_type
    rate = classifier.record.settings.get("learning_rate", MultiTaskTrainingArguments.learning_rate)
    assert rate == starting_learning_rate(classifier.adapter_config)
    assert (f"--method {method}" in classifier.record.command) == (method != "mmap")
    assert ("--config " in classifier.record.command) == (method in settings)
    assert call("predict", tmp_path / "out", Path(pictures, "print"))[0] == 0


@pytest.mark.parametrize("method", [name for name in METHODS if not isinstance(METHODS[name](), PromptConfig)])
def test_a_method_without_prompts_trains_on_one_task(method, call, clip_folder, tmp_path):
    draw_folder(tmp_path / "birds", ("photo",), ("sun", "cloud", "star"), 2)
    words = ["--model", clip_folder, "--method", method, "--output_dir", tmp_path / "out", "--max_steps", 1]
    code, _, told = call("train", tmp_path / "birds", *words, *QUIET)
    assert code == 0, told


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "maple", "--learning_rate", "0.03"],  # the default of mmap
        ["--grouping", "gradient"],
        ["--sharing", "groups", "--augment_scale", "0.5", "1.0"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-06}'],
    ],
)
def test_the_command_of_the_card_gives_the_same_arguments(words):
    parser = CommandParser("train", [TrainArguments, MultiTaskTrainingArguments], "", {"data": ""})

    def read(words):
        own, args, place, given = parser.parse(words)
        own.choose_learning_rate(args, given)
        return args, given, command_line(place.data, own, args, given)

    args, given, command = read(["birds", *words])
    again, given_again, same = read(shlex.split(command)[2:])
    assert command == same and given <= given_again
    for name in given - {"method"}:
        assert getattr(args, name) == getattr(again, name)


@pytest.mark.parametrize("words", [["pictures"], ["--model", "openai/clip-vit-base-patch32"]])
def test_a_demo_replaces_nothing_that_was_given(words, call):
    code, _, told = call("train", *words, "--demo")
    assert code == 2
    assert "--demo trains on Pictograms with the small CLIP" in told


def test_thirty_pictures_of_one_task_need_no_option(call, clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "birds", ("photo",), ("sun", "cloud", "star"), 2)
    assert call("train", "birds", "--model", clip_folder, *QUIET)[0] == 0
    found = json.loads((tmp_path / "out" / "birds" / "tasks.json").read_text())
    assert [(task["name"], task["route"]) for task in found["tasks"]] == [("birds", ["birds"])]
    command = found["training"]["command"]
    assert command.split()[:4] == ["mmap-peft", "train", "birds", "--model"]
    assert str(tmp_path) not in command and clip_folder not in command
    code, printed, _ = call("predict", "out/birds", "birds/sun/0.png", "birds/star", "birds/*/1.png")
    assert (code, len(printed.splitlines())) == (0, 1 + 5)  # each file once


def test_a_set_of_the_hub_without_domains_is_one_task(tmp_path):
    features = Features({"img": ImageColumn(), "fine_label": ClassLabel(names=["a", "b"])})
    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(4)]
    for part in ("train", "test"):
        data = Dataset.from_dict({"img": pictures, "fine_label": [0, 0, 1, 1]}, features)
        data.to_parquet(tmp_path / "Tiny-Set" / f"{part}.parquet")
    name, columns = str(tmp_path / "Tiny-Set"), ["img", "fine_label"]
    data = reading._one_domain(name, ["train", "test"], columns)
    assert data["split"][:] == ["train"] * 4 + ["test"] * 4
    assert reading._one_domain(name, ["train"], columns).column_names == ["image", "label", "file"]
    assert reading._plain(name) == "tiny set"


# ---- predict


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_those_of_the_class(call, trained, pictures):
    classifier = MultiTaskClassifier.from_pretrained(trained)
    files = sorted(str(path) for path in Path(pictures, "print").rglob("*.png"))
    for options, task in ((["--task", "print"], "print"), ([], None)):
        code, printed, _ = call("predict", trained, Path(pictures, "print"), *options, "--top", 2, "--batch_size", 4)
        expected = classifier.predict(files, task)
        found = rows(printed)
        assert code == 0
        assert [row["file"] for row in found] == files
        assert [row["label"] for row in found] == expected.labels
        assert [row["task"] for row in found] == (["print"] * len(files) if task else expected.tasks)
        best = expected.probabilities.topk(2).values.tolist()
        for row, pair in zip(found, best):
            assert [float(row["probability"]), float(row["probability_2"])] == pytest.approx(pair, abs=1e-5)


def test_other_classes_and_lines_of_json(call, trained, pictures, tmp_path):
    file, output = Path(pictures, "print", "sun", "0.png"), tmp_path / "found.jsonl"
    options = ["--task", "print", "--class_names", "cat", "dog", "--top", 5, "--output", output]
    assert call("predict", trained, file, *options) == (0, "", "")
    (line,) = output.read_text().splitlines()
    found = json.loads(line)
    assert (found["file"], found["task"]) == (str(file), "print")
    assert {each["label"] for each in found["classes"]} == {"cat", "dog"}
    assert sum(each["probability"] for each in found["classes"]) == pytest.approx(1, abs=1e-5)


def test_unreadable_files_are_named_and_the_others_predicted(call, trained, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = [tmp_path / "broken.png", Path(pictures, "print", "sun", "0.png"), tmp_path / "missing, file.png"]
    output = tmp_path / "found.csv"
    code, printed, told = call("predict", trained, *files, "--task", "print", "--output", output)
    assert (code, printed) == (1, "")
    assert [row["file"] for row in rows(output.read_text())] == [str(files[1])]
    assert f"{files[0]} cannot be read: it is no image of a format that Pillow knows" in told
    assert f"{files[2]} cannot be read: No such file or directory." in told
    assert told.endswith("2 of 3 files could not be read.\n")


def test_an_output_file_stays_if_prediction_fails(trained, pictures, tmp_path, monkeypatch, call):
    output = tmp_path / "found.csv"
    output.write_text("old")

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(MultiTaskClassifier, "predict", fail)
    code, _, told = call("predict", trained, Path(pictures, "print"), "--task", "print", "--output", output)
    assert (code, output.read_text()) == (2, "old")
    assert told == "mmap-peft predict: RuntimeError: out of memory (--debug shows where.)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv"]


def test_without_prototypes_a_task_is_asked_for(call, trained, pictures, tmp_path):
    classifier = MultiTaskClassifier.from_pretrained(trained)
    classifier.prototypes = classifier.grouping = None
    classifier.save_pretrained(tmp_path / "model")
    code, _, told = call("predict", tmp_path / "model", Path(pictures, "print"))
    assert code == 2
    assert "The model has no prototypes, which find an image's task; write --task with one of photo, print." in told


# ---- evaluate


def test_accuracies_are_those_of_the_trainer_on_the_images_held_out(call, trained, pictures, tmp_path):
    output = tmp_path / "found.json"
    code, printed, told = call("evaluate", trained, pictures, "--zero_shot", "--output", output)
    assert (code, told.splitlines()[-1]) == (0, "Evaluates the images that training held out.")
    found, expected = (json.loads(path.read_text()) for path in (output, Path(trained, "results.json")))
    for name, accuracy in expected["accuracy"].items():
        assert found["accuracy"][f"{name}_accuracy"] == accuracy["trained"]
        assert found["zero-shot"][f"{name}_accuracy"] == accuracy["zero_shot"]
    assert f"| print | 3 | {100 * expected['accuracy']['print']['zero_shot']:.1f} % |" in printed
    assert call("evaluate", trained, pictures, "--all_images")[1].count("| 15 |") == 2


def test_other_images_of_some_classes_are_evaluated_as_one_task(call, trained, tmp_path):
    folder = draw_folder(tmp_path / "others", ("sketch",), ("star", "sun"), 4)
    code, printed, told = call("evaluate", trained, folder, "--task", "print", "--output", tmp_path / "found.json")
    assert code == 0
    assert "Evaluates all images, since nothing says which of them did not train." in told
    assert "| print | 8 |" in printed
    classifier = MultiTaskClassifier.from_pretrained(trained)
    (data,) = read_folder(folder).values()
    predicted = classifier.predict(data["image"][:], "print").labels
    names = data.features["label"].names
    right = [name == names[label] for name, label in zip(predicted, data["label"][:])]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["accuracy"]["print_accuracy"] == sum(right) / 8
    assert (
        "The model has no task 'others'; write --task with one of photo, print" in call("evaluate", trained, folder)[2]
    )
    draw_folder(tmp_path / "unknown", ("sketch",), ("umbrella", "sun"), 2)
    told = call("evaluate", trained, tmp_path / "unknown", "--task", "print")[2]
    assert "'unknown' has the class 'umbrella', which task 'print' lacks; it has cloud, star, sun." in told


# ---- the others


def test_info_tells_what_the_folder_holds(call, trained, clip_folder):
    code, printed, _ = call("info", trained, "--json")
    found = json.loads(printed)
    classifier = MultiTaskClassifier.from_pretrained(trained)
    assert code == 0
    assert found["base"] == clip_folder
    assert found["license"] == "mit"
    assert found["settings"] == classifier.record.settings
    assert found["groups"] == classifier.grouping.groups
    sizes = {
        name: sum(each.numel() for each in classifier.adapter_parameters(name).values())
        for name in classifier.adapters
    }
    assert found["adapters"] == sizes
    assert found["parameters"] == sum(sizes.values())
    for name, task in classifier.tasks.items():
        shown = found["tasks"][name]
        assert shown["classes"] == task.class_names
        assert (tuple(shown["adapters"]), shown["prototypes"]) == (classifier.routes[name], True)
        assert shown["accuracy"] == classifier.record.prompted[name]
    code, printed, _ = call("info", trained)
    assert code == 0
    assert "| print | 3 |" in printed
    assert found["command"] in printed


def test_an_export_hands_its_options_on(call, trained, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(MultiTaskClassifier, "export", lambda self, *options: exported.append(options))
    argv = ["export", trained, "--task", "print", "--format", "torch", "--class_names", "a", "b"]
    assert call(*argv, "--output", tmp_path)[:2] == (0, f"{tmp_path / 'print.pt2'}\n")
    assert call("export", trained, "--task", "photo", "--output", "x.onnx")[:2] == (0, "x.onnx\n")
    assert exported == [
        ("print", "torch", str(tmp_path), ["a", "b"], None), ("photo", "onnx", "x.onnx", None, None)
    ]  # fmt: skip


def test_a_card_is_written_anew(call, trained, tmp_path):
    classifier = MultiTaskClassifier.from_pretrained(trained)
    classifier.record.license = classifier.grouping = None
    classifier.save_pretrained(tmp_path / "model")
    assert "license:" not in call("card", tmp_path / "model", "--print")[1]
    code, printed, _ = call("card", tmp_path / "model", "--license", "mit", "--repo_id", "me/mine")
    card = (tmp_path / "model" / "README.md").read_text()
    assert (code, printed) == (0, f"{tmp_path / 'model' / 'README.md'}\n")
    assert "license: mit\n" in card
    assert 'from_pretrained("me/mine"' in card
    assert MultiTaskClassifier.from_pretrained(tmp_path / "model").record.license == "mit"


def test_a_push_hands_its_options_on(call, trained, monkeypatch):
    pushed = {}

    class Commit:
        commit_url = "https://example.org/commit"

    def push(self, repo_id, **options):
        pushed.update(options, repo_id=repo_id, license=self.record.license)
        return Commit

    monkeypatch.setattr(MultiTaskClassifier, "push_to_hub", push)
    argv = ["push", trained, "me/mine", "--private", "--revision", "trial", "--license", "cc0-1.0"]
    assert call(*argv)[:2] == (0, "https://example.org/commit\n")
    assert pushed == {
        "repo_id": "me/mine", "private": True, "revision": "trial", "subfolder": None, "parent_commit": None,
        "commit_message": "Upload adapters", "license": "cc0-1.0",
    }  # fmt: skip


RUN = ("predict", "info")  # of other commands the arguments are read, and nothing is done


def test_the_commands_of_the_docs_run(call, trained, pictures, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "pictures")
    shutil.copytree(trained, "out/pictures")
    Path("settings.yaml").write_text("data: pictures\nnum_train_epochs: 3\n")
    parse = CommandParser.parse

    def parse_only(self, argv):
        found = parse(self, argv)
        if self.prog.split()[-1] not in RUN:
            raise SystemExit(0)
        return found

    monkeypatch.setattr(CommandParser, "parse", parse_only)
    for name, *argv in lines:
        assert name == "mmap-peft"
        assert call(*argv)[0] == 0, argv
    assert {argv[1] for argv in lines} == set(COMMANDS)
