import hashlib
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mmap_peft.data.domains import read_domains, read_folder, read_hub
from mmap_peft.data.splits import Split, make_tasks, read_lists, split_at_random

from .test_folders import write_images


LISTS = Path(__file__).parents[3] / "shared" / "data" / "office_home_splits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains of three classes; one domain lacks a class."""
    root = tmp_path_factory.mktemp("images")
    for domain, classes in (("Art", ["Alarm_Clock", "Bed", "TV"]), ("Real World", ["Alarm_Clock", "TV"])):
        for number, name in enumerate(classes):
            (root / domain / name).mkdir(parents=True)
            for index in range(10):
                Image.new("RGB", (8, 8), (20 * index, 80 * number, 0)).save(root / domain / name / f"{index:05}.png")
    (root / "Art" / "Bed" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def domains(folder):
    return read_folder(folder)


def test_a_folder_becomes_domains_with_the_same_classes(domains, folder):
    assert list(domains) == ["Art", "Real World"]
    assert [len(data) for data in domains.values()] == [30, 20]
    assert all(data.features["label"].names == ["Alarm_Clock", "Bed", "TV"] for data in domains.values())
    assert domains["Real World"][10]["label"] == 2
    assert domains["Art"][0]["file"] == "Art/Alarm_Clock/00000.png"
    assert read_domains(str(folder)).keys() == domains.keys()


def test_a_folder_without_images_stops_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no images of the form domain/class/image"):
        read_folder(tmp_path)


def test_only_some_domains_and_classes_of_a_folder(folder):
    domains = read_folder(folder, ["Real_World"], ["tv", "alarm-clock"])
    assert list(domains) == ["Real_World"]
    assert domains["Real_World"].features["label"].names == ["tv", "alarm-clock"]
    place = {file: row for row, file in enumerate(domains["Real_World"]["file"][:])}
    assert len(place) == 20
    assert domains["Real_World"][place["Real World/Alarm_Clock/00003.png"]]["label"] == 1
    with pytest.raises(ValueError, match="lacks 'Product' and 0 more of 2 names; it has Art, Real World"):
        read_folder(folder, ["Art", "Product"])
    with pytest.raises(ValueError, match="lacks 'Sofa' and 0 more of 2 names; it has Alarm_Clock, Bed, TV"):
        read_folder(folder, classes=["TV", "Sofa"])


def test_a_data_set_of_the_hub_becomes_domains(tmp_path):
    """The hub's loader reads a local folder of parquet files the same way."""
    rows = {
        "image": [Image.new("RGB", (8, 8))] * 4,
        "domain": ["Art", "Clipart", "Art", "Clipart"],
        "label": [0, 1, 1, 0],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "domain": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["Bed", "TV"]),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    domains = read_hub(str(tmp_path))
    assert {name: data["label"][:] for name, data in domains.items()} == {"Art": [0, 1], "Clipart": [1, 0]}
    tasks = make_tasks(domains, split_at_random(domains, shots=1))
    assert [task.name for task in tasks] == ["art", "clipart"]
    datasets.Dataset.from_dict({"image": [1]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="but no 'domain'"):
        read_hub(str(tmp_path))
    datasets.Dataset.from_dict({"image": [1], "domain": ["Art"], "label": [0]}).to_parquet(
        str(tmp_path / "train.parquet")
    )
    with pytest.raises(ValueError, match="so its classes have no names"):
        read_hub(str(tmp_path))


def counts(data, files):
    place = {file: row for row, file in enumerate(data["file"][:])}
    return np.bincount([data[place[file]]["label"] for file in files], minlength=3).tolist()


def test_a_fraction_of_each_class_trains_and_the_rest_evaluates(domains):
    split = split_at_random(domains, fraction=0.2, seed=1)
    for name, data in domains.items():
        assert set(split.train[name]).isdisjoint(split.eval[name])
        assert sorted(split.train[name] + split.eval[name]) == sorted(data["file"][:])
    assert counts(domains["Art"], split.train["Art"]) == [2, 2, 2]
    assert counts(domains["Art"], split_at_random(domains, fraction=0.01).train["Art"]) == [1, 1, 1]
    assert counts(domains["Art"], split_at_random(domains, shots=3).train["Art"]) == [3, 3, 3]


def test_a_split_depends_on_its_seed_only(domains, tmp_path):
    one, again, other = (split_at_random(domains, fraction=0.2, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.digest == again.digest != other.digest
    one.save(tmp_path / "split.json")
    saved = json.loads((tmp_path / "split.json").read_text())
    assert (saved["train"], saved["digest"], saved["source"]["seed"]) == (one.train, one.digest, 1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "either fraction or shots"),
        ({"fraction": 0.1, "shots": 2}, "either fraction or shots"),
        ({"fraction": 1.0}, r"write a number in \(0, 1\)"),
        ({"shots": 0}, "write 1 or more"),
    ],
)
def test_wrong_fractions_stop_with_a_sentence(fields, sentence, domains):
    with pytest.raises(ValueError, match=sentence):
        split_at_random(domains, **fields)


def test_the_digest_is_of_the_chosen_files(domains):
    split = split_at_random(domains, fraction=0.2)
    chosen = json.dumps([split.train, split.eval], sort_keys=True)
    assert split.digest == hashlib.sha256(chosen.encode()).hexdigest()
    split.eval["Art"].pop()
    assert split.digest != hashlib.sha256(chosen.encode()).hexdigest()


def test_a_subset_is_the_same_for_every_seed(domains):
    one, two = (split_at_random(domains, fraction=0.5, seed=seed, at_most=4) for seed in (1, 2))
    for name, data in domains.items():
        used = sorted(one.train[name] + one.eval[name])
        assert used == sorted(two.train[name] + two.eval[name])
        by_hash = sorted(data["file"][:], key=lambda file: hashlib.sha256(file.encode()).hexdigest())
        folders = {file.rsplit("/", 1)[0] for file in by_hash}
        for folder in folders:
            smallest = [file for file in by_hash if file.startswith(f"{folder}/")][:4]
            assert sorted(smallest) == [file for file in used if file.startswith(f"{folder}/")]
        assert len(used) == 4 * len(folders)
        assert len(one.train[name]) == len(one.eval[name]) == len(used) / 2
    assert one.train != two.train
    assert "the 4 images whose file has the smallest SHA-256" in one.source["subset"]
    assert split_at_random(domains, shots=3, at_most=10).digest == split_at_random(domains, shots=3).digest
    with pytest.raises(ValueError, match="at_most=1 leaves nothing"):
        split_at_random(domains, fraction=0.5, at_most=1)


def write_lists(root, train, test):
    for domain in train:
        (root / domain).mkdir(parents=True, exist_ok=True)
        (root / domain / "train_10.txt").write_text("".join(f"{line}\n" for line in train[domain]))
        (root / domain / "test_10.txt").write_text("".join(f"{line}\n" for line in test[domain]))


def test_published_lists_choose_the_files(domains, tmp_path):
    train = {"Art": ["Art/Bed/00003.png 1"], "Real_World": ["Real_World/TV/00001.png 2"]}
    test = {"Art": ["Art/TV/00004.png 2"], "Real_World": ["Real_World/Alarm_Clock/00000.png 0"]}
    write_lists(tmp_path, train, test)
    tasks = make_tasks(domains, read_lists(tmp_path, 0.1), template="a {}")
    assert [task.name for task in tasks] == ["art", "real world"]
    assert tasks[1].train[0]["file"] == "Real World/TV/00001.png"
    assert tasks[1].labels("eval").tolist() == [0]
    assert tasks[0].texts[1] == ("a bed",)


def test_lists_that_do_not_fit_stop_with_a_sentence(domains, tmp_path):
    with pytest.raises(ValueError, match="has no lists of 10 % for each domain"):
        read_lists(tmp_path, 0.1)
    write_lists(tmp_path, {"Art": ["Art/Bed/00099.png 1"]}, {"Art": ["Art/Bed/00001.png 1"]})
    with pytest.raises(ValueError, match=r"names 'Art/Bed/00099\.png' and 0 more files of 'Art' that the data lack"):
        make_tasks(domains, read_lists(tmp_path, 0.1))
    write_lists(tmp_path, {"Art": ["Art/Bed 1"]}, {"Art": ["Art/Bed/00001.png 1"]})
    with pytest.raises(ValueError, match="is not of the form Domain/Class/file label"):
        read_lists(tmp_path, 0.1)
    write_lists(tmp_path, {"Art": ["Art/Bed/00001.png 1"]}, {"Art": ["Art/TV/00001.png 1"]})
    with pytest.raises(ValueError, match=r"gives 'TV' the label 1, but elsewhere .* 1 is the label of 'Bed'"):
        read_lists(tmp_path, 0.1)
    write_lists(tmp_path, {"Art": ["Art/Bed/00001.png 1"]}, {"Art": ["Art/Bed/00002.png 2"]})
    with pytest.raises(ValueError, match="gives 'Bed' the label 2, but elsewhere its label is 1"):
        read_lists(tmp_path, 0.1)
    write_lists(tmp_path, {"Art": ["Art/Bed/00001.png 1"]}, {"Art": ["Art/Bed/00001.png 1"]})
    with pytest.raises(ValueError, match=r"'Art/Bed/00001\.png' and 0 more images are in .*train_10\.txt and in "):
        read_lists(tmp_path, 0.1)
    write_lists(tmp_path, {"Product": ["Product/Bed/1.png 1"]}, {"Product": []})
    (tmp_path / "Art" / "train_10.txt").unlink()
    (tmp_path / "Art" / "test_10.txt").unlink()
    with pytest.raises(ValueError, match="has a domain 'Product', but the data have"):
        make_tasks(domains, read_lists(tmp_path, 0.1))


@pytest.mark.skipif(not LISTS.is_dir(), reason="the published lists lie beside the repository, not in it")
@pytest.mark.parametrize(("fraction", "art"), [(0.05, 121), (0.1, 243), (0.2, 485)])
def test_the_published_lists_of_office_home_are_read(fraction, art):
    split = read_lists(LISTS, fraction)
    assert list(split.train) == ["Art", "Clipart", "Product", "Real_World"]
    assert len(split.train["Art"]) == art
    assert len(split.train["Art"]) + len(split.eval["Art"]) == 2427
    assert all(set(split.train[name]).isdisjoint(split.eval[name]) for name in split.train)


def test_files_that_differ_in_case_or_spaces_are_not_mixed_up(tmp_path):
    names = ["1 a.png", "1_a.png", "1_A.png", "B.png"]
    write_images(tmp_path, [f"Art/{name}/{file}" for name in ("Bed", "TV") for file in names])
    domains = read_folder(tmp_path)
    split = Split({"Art": ["Art/Bed/1 a.png", "Art/bed/b.png"]}, {"art": ["Art/Bed/1_A.png"]}, {})
    with pytest.raises(ValueError, match="only in train or only in eval"):
        make_tasks(domains, split)
    split.eval["Art"] = split.eval.pop("art")
    (task,) = make_tasks(domains, split)
    assert task.train["file"][:] == ["Art/Bed/1 a.png", "Art/Bed/B.png"]
    assert task.eval["file"][:] == ["Art/Bed/1_A.png"]
    for file, sentence in (
        ("Art/Bed/1 A.png", "'Art/Bed/1 A.png' may be 'Art/Bed/1 a.png' and 'Art/Bed/1_A.png'"),
        ("Art/Bed/b.png", "'Art/bed/b.png' in train and 'Art/Bed/b.png' in eval of 'Art' are one image"),
        ("Art/Bed/1 a.png", "'Art/Bed/1 a.png' in train and 'Art/Bed/1 a.png' in eval"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_tasks(domains, Split(split.train, {"Art": [file]}, {}))
    twice = datasets.concatenate_datasets([domains["Art"], domains["Art"]])
    with pytest.raises(ValueError, match=r"Two images of 'Art' have the `file` 'Art/Bed/1 a\.png'"):
        split_at_random({"Art": twice}, shots=1)
    with pytest.raises(ValueError, match="'ART' and 'Art' of the split are the same domain"):
        make_tasks(domains, Split(*({"Art": [], "ART": []} for _ in range(2)), {}))


def test_lists_of_other_systems_are_read(domains, tmp_path):
    (tmp_path / "Art").mkdir()
    (tmp_path / "Art" / "train_10.txt").write_bytes(
        "\ufeffArt/Bed/00003.png  01\r\n\r\nArt/TV/00001.png\t2\r\n".encode()
    )
    (tmp_path / "Art" / "test_10.txt").write_bytes(b"Art/Bed/a b.png 1")
    split = read_lists(tmp_path, 0.1)
    assert (split.train, split.eval) == (
        {"Art": ["Art/Bed/00003.png", "Art/TV/00001.png"]},
        {"Art": ["Art/Bed/a b.png"]},
    )
    for text, sentence in (
        ("Art/Bed/é.png 1".encode("utf-16"), "test_10.txt is no UTF-8 from byte 0 on"),
        (b"Art/Bed/1.png 1\nArt/Bed/1.png 1", r"test_10.txt names 'Art/Bed/1\.png' twice"),
        ("Art/Bed/1.png ²".encode(), "of .*test_10.txt is not of the form"),
        (b"Art/Bed/" + 5000 * b"1" + b".png", "of .*test_10.txt is not of the form"),
    ):
        (tmp_path / "Art" / "test_10.txt").write_bytes(text)
        with pytest.raises(ValueError, match=sentence) as error:
            read_lists(tmp_path, 0.1)
        assert len(str(error.value)) <= 500
    (tmp_path / "Art" / "test_10.txt").unlink()
    os.mkfifo(tmp_path / "Art" / "test_10.txt")
    with pytest.raises(ValueError, match="is no file"):
        read_lists(tmp_path, 0.1)
    with pytest.raises(ValueError, match="for `fraction`"):
        read_lists(tmp_path, None)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"label": [0, -1]}, r"Row 1 and 0 more of 2 rows .* have no label \(-1\)"),
        ({"domain": ["Art", None]}, r"Row 1 and 0 more of 2 rows .* have no domain \(None\)"),
        ({"image_path": ["a/Bed/1.png", "a/Bed/1.png"]}, None),
        ({"file": ["x", "y"], "image_path": ["a/Bed/1.png", None]}, None),
    ],
)
def test_gaps_in_a_data_set_of_the_hub_are_named(changed, sentence, tmp_path, caplog):
    rows = {"image": ["a", "b"], "domain": ["Art", "Art"], "label": [0, 1], **changed}
    features = {name: datasets.Value("string") for name in rows}
    features["label"] = datasets.ClassLabel(names=["Bed", "TV"])
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(str(tmp_path / "train.parquet"))
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            read_hub(str(tmp_path))
    else:
        assert read_hub(str(tmp_path))["Art"]["file"][:] == ["0", "1"]
        assert "have the same or no image_path" in caplog.text
