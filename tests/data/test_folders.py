"""Folders of images in all layouts, with what people and systems put beside the images."""

import os

import pytest
from PIL import Image

from mmap_peft.data.domains import read_domains, read_folder
from mmap_peft.data.splits import has_split, make_tasks, split_at_random, split_of_folders


def write_images(root, files):
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1), (number, 0, 0)).save(root / file, "PNG")


LAYOUTS = {
    "class": ("{c}/1.png", ["photos"]),
    "domain/class": ("{d}/{c}/1.png", ["Art", "Real World"]),
    "split/class": ("{s}/{c}/1.png", ["photos"]),
    "domain/split/class": ("{d}/{s}/{c}/1.png", ["Art", "Real World"]),
    "split/domain/class": ("{s}/{d}/{c}/1.png", ["Art", "Real World"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_with_its_splits(layout, tmp_path):
    form, names = LAYOUTS[layout]
    parts = {"Train": "train", "val": "validation"} if "split" in layout else {"": ""}
    files = {
        form.format(c=c, d=d, s=s): (d if "domain" in layout else "photos", parts[s], c)
        for c in ("Bed", "train", "TV")
        for d in ("Art", "Real World")
        for s in parts
    }
    write_images(tmp_path / "photos", files)
    for given in (None, layout):
        domains = read_folder(f"{tmp_path}/photos/", layout=given)
        assert list(domains) == names
        rows = {row["file"]: (name, row, data) for name, data in domains.items() for row in data}
        assert sorted(rows) == sorted(files)
        for file, (name, row, data) in rows.items():
            assert (name, row.get("split", ""), data.features["label"].int2str(row["label"])) == files[file]
    assert has_split(domains) == ("split" in layout)
    if "split" in layout:
        split = split_of_folders(domains)
        assert {name: (len(split.train[name]), len(split.eval[name])) for name in names} == dict.fromkeys(
            names, (3, 3)
        )
        drawn = split_at_random(domains, shots=1)
        assert (drawn.eval, drawn.train) == (split.eval, split.train)
        assert [task.labels("eval").tolist() for task in make_tasks(domains, split)] == len(names) * [[0, 1, 2]]
    else:
        with pytest.raises(ValueError, match="do not say which images train"):
            split_of_folders(domains)


def test_validation_images_are_left_out_where_there_are_test_images(tmp_path, caplog):
    write_images(tmp_path, [f"{part}/{name}/1.png" for part in ("train", "dev", "test") for name in ("Bed", "TV")])
    split = split_of_folders(read_folder(tmp_path))
    assert list(split.eval.values()) == [["test/Bed/1.png", "test/TV/1.png"]]
    assert "2 validation images of" in caplog.text


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["Art/Bed/1.png", "Art/TV/old/2.png"], r"'Art/TV/old/2\.png' .* lies 3 folders deep, but others lie 2 deep"),
        (["Art/Bed/1.png", "Art/TV/1.png", "2.png"], r"'2\.png' .* lies 0 folders deep"),
        (["a/b/c/d/1.png"], r"'a/b/c/d/1\.png' .* does not show what its folders are"),
        (["train/1.png", "test/1.png"], r"'train/1\.png' .* does not show"),
        (["Art/train/1.png", "Art/test/1.png"], r"'Art/train/1\.png' .* does not show"),
        (["train/Bed/1.png", "extra/Bed/1.png"], r"'train/Bed/1\.png' or 'extra/Bed/1\.png' .* write layout="),
        (["Art/train/Bed/1.png", "Art/new/Bed/1.png"], r"'Art/train/Bed/1\.png' .* does not show"),
        (["Art/Bed/\udce9.png"], r"The name of '.*Art/Bed/\\udce9\.png' is not valid UTF-8"),
    ],
)
def test_folders_that_are_not_clear_stop_with_a_sentence(files, sentence, tmp_path):
    write_images(tmp_path, files)
    with pytest.raises(ValueError, match=sentence) as error:
        read_folder(tmp_path)
    assert len(str(error.value)) <= 500


def test_hidden_files_are_left_out_and_what_is_no_image_is_named(tmp_path, caplog):
    images = ["Art/Bed/1.png", "Art/TV/a.png"]
    hidden = [
        "._1.png",
        "Art/.cache/1.png",
        "Art/Bed/._1.png",
        "@eaDir/x/1.png",
        "Art/TV/1.png~",
        "__MACOSX/a/b/1.png",
    ]
    write_images(tmp_path, images + hidden)
    assert read_folder(tmp_path)["Art"]["file"][:] == images
    assert not caplog.records
    os.mkfifo(tmp_path / "Art/Bed/pipe.png")
    (tmp_path / "Art/Bed/gone.png").symlink_to("nowhere")
    (tmp_path / "Art/Bed/picture.heic").touch()
    (tmp_path / "Art/Bed/again").symlink_to(tmp_path)
    (tmp_path / "Art/Bed/folder.png").mkdir()
    assert read_folder(tmp_path)["Art"]["file"][:] == images
    assert "has 4 files or links that are no images that can be read, such as 'Art/Bed/" in caplog.text
    (tmp_path / "Art/Sofa").symlink_to("Bed")
    with pytest.raises(ValueError, match=r"'Art/Sofa/1\.png' and 'Art/Bed/1\.png' .* are one image, by a link"):
        read_folder(tmp_path)


def test_a_root_that_is_no_folder_stops_with_a_sentence(tmp_path, monkeypatch):
    write_images(tmp_path, ["Art/Bed/1.png"])
    for path in ("missing", "Art/Bed/1.png", "a\0b"):
        with pytest.raises(OSError, match="is no folder"):
            read_domains(f"{tmp_path}/{path}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read_domains("~")) == list(read_folder("~/")) == ["Art"]
    for wanted in ("Art", []):
        with pytest.raises(ValueError, match="for `domains`"):
            read_folder(tmp_path, wanted)
    with pytest.raises(ValueError, match="'Art' and 'art' name the same domain"):
        read_folder(tmp_path, ["Art", "art"])
    with pytest.raises(ValueError, match="for `layout`"):
        read_folder(tmp_path, layout="image")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root needs no permission")
def test_a_folder_without_permission_is_named(tmp_path):
    write_images(tmp_path, ["Art/Bed/1.png", "Art/TV/1.png"])
    (tmp_path / "Art" / "TV").chmod(0)
    with pytest.raises(OSError, match=r"Folder 'Art/TV' in .* cannot be read"):
        read_folder(tmp_path)
    assert len(read_folder(tmp_path, classes=["Bed"])["Art"]) == 1


def test_spellings_of_one_class_or_domain_become_one_with_a_warning(tmp_path, caplog):
    files = ["Art/Caf\u00e9/1.png", "Art/Cafe\u0301/2.png", "art/TV/3.png", "Art/tv/4.png"]
    write_images(tmp_path, files)
    (data,) = read_folder(tmp_path).values()
    assert data.features["label"].names == ["Caf\u00e9", "TV"]
    assert dict(zip(data["file"], data["label"])) == dict(zip(files, [0, 0, 1, 1]))
    for words in (r"'Cafe\u0301', 'Caf\xe9' are one class, 'Caf\xe9'", "'Art', 'art' are one domain, 'Art'"):
        assert words in caplog.text
