"""On a DomainNet of tiny pictures: five of its domains, 128 of its classes, four images each."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mmap_peft.data.domains import read_hub
from mmap_peft.data.mini_domainnet import CLASS_NAMES, DOMAINS, read_mini_domainnet, read_mini_lists
from mmap_peft.data.splits import draw, make_tasks, split_at_random
from mmap_peft.multitask.task import clean_name


NAMES = Path(__file__).parents[3] / "shared" / "data" / "domainnet_126_classes.txt"
ALL_CLASSES = ["airplane", *CLASS_NAMES, "zigzag"]
FILES = [
    f"{domain}/{name}/{domain}_{number:03}_{index:06}.png"
    for domain in [*DOMAINS, "quickdraw"]
    for number, name in enumerate(ALL_CLASSES)
    for index in range(4)
]


def picture(file):
    """Its colour says of which class and domain it is."""
    domain, name, _ = file.split("/")
    return Image.new("RGB", (4, 4), (ALL_CLASSES.index(name), [*DOMAINS, "quickdraw"].index(domain), 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("domainnet")
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(file).save(root / file)
    return root


def write_lists(root, numbering=CLASS_NAMES):
    """Lists in which the first three images of a class train and the last evaluates."""
    root.mkdir(exist_ok=True)
    for domain in DOMAINS:
        for part, keep in (("train", "012"), ("test", "3")):
            lines = [
                f"{file} {numbering.index(file.split('/')[1])}\n"
                for file in FILES
                if file.startswith(f"{domain}/") and file.split("/")[1] in CLASS_NAMES and file[-5] in keep
            ]
            (root / f"{domain}_{part}.txt").write_text("".join(lines))
    return root


def test_there_are_126_classes_with_names_of_their_own():
    assert len(CLASS_NAMES) == len({clean_name(name) for name in CLASS_NAMES}) == 126


@pytest.mark.skipif(not NAMES.is_file(), reason="the list of names lies beside the repository, not in it")
def test_the_names_are_those_of_the_published_list():
    assert NAMES.read_text().split() == CLASS_NAMES


def test_a_folder_is_restricted_to_the_domains_and_classes(folder):
    domains = read_mini_domainnet(str(folder))
    assert list(domains) == DOMAINS
    for domain, data in domains.items():
        assert data.features["label"].names == CLASS_NAMES
        assert len(data) == 4 * 126
        for row in data.select(range(0, len(data), 97)):
            assert row["file"].startswith(f"{domain}/{CLASS_NAMES[row['label']]}/")
    split = split_at_random(domains, shots=1, at_most=3)
    assert [len(split.train[name]) for name in DOMAINS] == 4 * [126]
    assert [len(split.eval[name]) for name in DOMAINS] == 4 * [252]


@pytest.mark.parametrize("paths", [True, False])
def test_a_data_set_like_the_hub_s_is_restricted_likewise(tmp_path, paths):
    """The hub's loader reads a local folder of parquet files the same way."""
    domains, names = [*DOMAINS, "quickdraw"], sorted(ALL_CLASSES)  # another order than ours
    features = {"image": datasets.Image(), "domain": datasets.ClassLabel(names=domains)}
    features |= {"label": datasets.ClassLabel(names=names), "image_path": datasets.Value("string")}
    table = {
        "image": [picture(file) for file in FILES],
        "domain": [file.split("/")[0] for file in FILES],
        "label": [file.split("/")[1] for file in FILES],
        "image_path": FILES,
    }
    data = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    if not paths:
        data = data.remove_columns("image_path")
    data.select(range(1000)).to_parquet(str(tmp_path / "train.parquet"))
    data.select(range(1000, len(data))).to_parquet(str(tmp_path / "test.parquet"))

    domains = read_hub(str(tmp_path), DOMAINS, CLASS_NAMES)
    assert list(domains) == DOMAINS
    for domain, found in domains.items():
        assert len(found) == 4 * 126
        for row in found.select(range(0, len(found), 13)):
            colour = row["image"].getpixel((0, 0))
            assert (ALL_CLASSES[colour[0]], DOMAINS[colour[1]]) == (CLASS_NAMES[row["label"]], domain)
            assert not paths or row["file"].startswith(f"{domain}/{CLASS_NAMES[row['label']]}/")
    if paths:  # then lists say which rows are meant
        split = draw(read_mini_lists(write_lists(tmp_path / "lists")), shots=1)
        assert [len(task.train) for task in make_tasks(domains, split)] == 4 * [126]


def test_a_part_of_the_training_lists_trains_and_the_test_lists_evaluate(folder, tmp_path):
    lists = read_mini_lists(write_lists(tmp_path / "lists", numbering=CLASS_NAMES[::-1]))
    split = draw(lists, shots=2, seed=1)
    for domain in DOMAINS:
        assert len(split.train[domain]) == 2 * 126
        assert set(split.train[domain]) < set(lists.train[domain])
    assert split.eval == lists.eval
    assert split == draw(lists, shots=2, seed=1)
    assert split.digest != draw(lists, shots=2, seed=2).digest
    assert draw(lists, fraction=0.34).train.keys() == lists.train.keys()
    assert len(draw(lists, fraction=0.34).train["real"]) == 126
    assert split.source == {"lists": "MiniDomainNet", "fraction": None, "shots": 2, "seed": 1}
    split.save(tmp_path / "split.json")
    assert json.loads((tmp_path / "split.json").read_text())["digest"] == split.digest
    tasks = make_tasks(read_mini_domainnet(str(folder)), split)
    assert [task.name for task in tasks] == DOMAINS
    for task in tasks:
        assert task.class_names[77] == clean_name(CLASS_NAMES[77])
        assert [row["file"].split("/")[1] for row in task.eval] == [
            CLASS_NAMES[label] for label in task.labels("eval")
        ]
    with pytest.raises(ValueError, match="either fraction or shots"):
        draw(lists)


def test_data_that_lack_something_stop_with_a_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="lacks 'clipart' and 3 more of 4 names; it has none"):
        read_mini_domainnet(str(tmp_path))
    for domain in DOMAINS:
        (tmp_path / domain / "zebra").mkdir(parents=True)
    with pytest.raises(ValueError, match="lacks 'aircraft_carrier' and 124 more of 126 names; it has zebra"):
        read_mini_domainnet(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "line", "sentence"),
    [
        ("real_test.txt", None, "has no real_test.txt; give the folder of MiniDomainNet's lists"),
        (
            "real_train.txt",
            "real/zigzag/real_127_000000.png 126",
            "'real/zigzag/real_127_000000.png', whose class is not",
        ),
        ("real_train.txt", "real/zebra/real_126_000009.png 7", "gives 'zebra' the label 7, but elsewhere"),
        ("real_train.txt", "real/zebra 125", "is not of the form Domain/Class/file label"),
        ("real_train.txt", "real/zebra/real_126_000003.png 125", "and in .*real_test.txt as well"),
    ],
)
def test_wrong_lists_stop_with_a_sentence(name, line, sentence, tmp_path):
    path = write_lists(tmp_path) / name
    if line is None:
        path.unlink()
    else:
        path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=sentence):
        read_mini_lists(tmp_path)


def test_a_listed_image_that_the_data_lack_stops_with_a_sentence(folder, tmp_path):
    path = write_lists(tmp_path) / "sketch_test.txt"
    path.write_text(f"{path.read_text()}sketch/zebra/sketch_126_000099.png 125\n")
    split = draw(read_mini_lists(tmp_path), fraction=0.5)
    with pytest.raises(ValueError, match=r"names 'sketch/zebra/sketch_126_000099\.png' and 0 more files of 'sketch'"):
        make_tasks(read_mini_domainnet(str(folder)), split)
