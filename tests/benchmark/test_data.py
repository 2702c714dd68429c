"""The data sets of a study, with and without published lists."""

import pytest

from benchmark.data import DataSet
from benchmark.study import Study
from mmap_peft.data.mini_domainnet import CLASS_NAMES, DOMAINS
from mmap_peft.data.pictograms import draw


def write_images(root, domains, classes, count):
    """Files that only their names matter of: nothing here opens an image."""
    for domain in domains:
        for name in classes:
            (root / domain / name).mkdir(parents=True)
            for number in range(count):
                (root / domain / name / f"{number}.jpg").touch()


def write_list(path, domain, classes, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{domain}/{name}/{n}.jpg {label}\n" for label, name in enumerate(classes) for n in numbers]
    path.write_text("".join(lines))


def sizes(data, fraction, shots):
    domains, split = data.read(fraction, shots, 0)
    return [(len(task.train), len(task.eval)) for task in data.make_tasks(split, domains, "a {}.")]


def test_office_home(tmp_path):
    classes = ["Bed", "TV", "Alarm_Clock"]
    write_images(tmp_path / "images", ["Art", "Real World"], classes, 6)
    for domain in ("Art", "Real_World"):
        write_list(tmp_path / "lists" / domain / "train_10.txt", domain, classes, range(1))
        write_list(tmp_path / "lists" / domain / "test_10.txt", domain, classes, range(1, 6))
    images, lists = str(tmp_path / "images"), str(tmp_path / "lists")
    assert sizes(DataSet("office_home", images), 0.5, None) == 2 * [(9, 9)]
    assert sizes(DataSet("office_home", images, lists), 0.1, None) == 2 * [(3, 15)]
    assert sizes(DataSet("folder", images, at_most=4), None, 1) == 2 * [(3, 9)]
    with pytest.raises(ValueError, match="are of fractions, not of 2 shots"):
        sizes(DataSet("office_home", images, lists), None, 2)


def test_mini_domainnet(tmp_path):
    write_images(tmp_path, [*DOMAINS, "quickdraw"], [*CLASS_NAMES, "zigzag"], 3)
    for domain in DOMAINS:
        write_list(tmp_path / "lists" / f"{domain}_train.txt", domain, CLASS_NAMES, range(2))
        write_list(tmp_path / "lists" / f"{domain}_test.txt", domain, CLASS_NAMES, [2])
    assert sizes(DataSet("mini_domainnet", str(tmp_path), at_most=2), None, 1) == 4 * [(126, 126)]
    assert sizes(DataSet("mini_domainnet", str(tmp_path), str(tmp_path / "lists")), None, 1) == 4 * [(126, 126)]


def test_lists_and_places_in_settings(tmp_path):
    with_lists = DataSet("office_home", str(tmp_path), str(tmp_path), label="office").settings
    assert with_lists == {"name": "office_home", "label": "office", "lists": True}
    assert DataSet("pictograms", per_class=5).settings == {"name": "pictograms", "label": "pictograms", "per_class": 5}


def test_duplicates_do_not_train_if_asked(tmp_path):
    root = tmp_path / "images" / "photo"
    for name in ("sun", "cloud"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            draw("photo", name, number if name == "sun" else min(number, 2)).save(root / name / f"{number}.png")
    plain, drops = (DataSet("folder", str(tmp_path / "images"), drop_duplicates=drop) for drop in (False, True))
    assert drops.settings == {**plain.settings, "drop_duplicates": True}
    for seed in range(6):
        (_, split), (_, left) = (data.read(0.5, None, seed) for data in (plain, drops))
        copies = {"photo/cloud/2.png", "photo/cloud/3.png"}
        both = len(copies.intersection(split.train["photo"])) == 1
        assert len(split.train["photo"]) - len(left.train["photo"]) == left.source["duplicates"] == both
        assert left.eval == split.eval
    listed = tmp_path / "list.txt"
    listed.write_text("photo/sun/0.png\n")
    data = DataSet("folder", str(tmp_path / "images"), drop_duplicates=True, duplicates=str(listed))
    assert data.settings == {**drops.settings, "duplicates": True}
    assert all("photo/sun/0.png" not in data.read(0.5, None, seed)[1].train["photo"] for seed in range(6))


def test_a_list_of_duplicates_is_read_before_the_first_run_as_seen_from_the_study(study_file):
    fields = {"name": "pictograms", "drop_duplicates": True, "duplicates": "../list.txt"}
    path = study_file(data=[fields])
    with pytest.raises(OSError, match=r"list\.txt"):
        Study.read(path).prepare()
    (path.parent.parent / "list.txt").write_text("print/sun/0.png\n")
    Study.read(path).prepare()


@pytest.mark.parametrize("fields", [{"drop_duplicates": "yes"}, {"drop_duplicates": 1}, {"duplicates": "list.txt"}])
def test_duplicates_are_dropped_by_a_switch(fields):
    with pytest.raises(ValueError, match="write `drop_duplicates: true`, with or without a file"):
        DataSet("pictograms", **fields)
