"""Folders of images as people have them: each image is read where it belongs, or one sentence names what is wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmap_peft.data import splits
from mmap_peft.data.domains import read_folder

from .campaigns import Campaign, one_sentence


LAYOUTS = ["domain/class", "class", "split/class", "domain/split/class", "split/domain/class"]
DOMAINS = ["Art", "Real World", "clip-art", "Café", "写真", "Эскиз", "real_photos"]
CLASSES = ["Alarm_Clock", "Bed", "TV", "Éclair", "train", "straße", "椅子", "Paper Clip", "O'Brien", "x.png"]
SPLITS = [("train", "test"), ("Training", "validation"), ("train", "val", "test"), ("train", "eval"), ("train", "dev")]


def plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").replace("-", " ").lower().split())


class Folder:
    """A random folder that knows what each image is. Its images have one pixel, whose colour is their number."""

    def __init__(self, rng: random.Random, root: Path) -> None:
        self.rng, self.root, self.layout = rng, root, rng.choice(LAYOUTS)
        self.levels = self.layout.split("/")
        self.expected: dict[int, tuple[str, str, str]] = {}  # domain, split, class by number
        self.files: dict[int, str] = {}
        self.refusals: list[str] = []  # names that an error may hold; without any there must be no error
        self.must_refuse = False
        self.warnings: list[str] = []  # what must be said if there is no error
        self.drop_rights = False
        domains = rng.sample(DOMAINS, rng.randint(1, 3)) if "domain" in self.levels else [root.name]
        parts = [word.title() if rng.random() < 0.1 else word for word in rng.choice(SPLITS)]
        classes = rng.sample(CLASSES, rng.randint(2, 4))
        lacking = rng.choice(domains) if len(domains) > 1 and rng.random() < 0.3 else None
        for domain in domains:
            for split in parts if "split" in self.levels else [""]:
                for name in classes[1:] if domain == lacking else classes:
                    for number in range(rng.randint(2, 3)):
                        self.add(domain, split, name, f"{number:02}{rng.choice(['.png', '.PNG', ' a_b.png'])}")

    def folder(self, domain: str, split: str, name: str) -> str:
        return "/".join({"domain": domain, "split": split, "class": name}[level] for level in self.levels)

    def add(self, domain: str, split: str, name: str, file: str, under: str = "") -> None:
        number, path = len(self.expected), self.root / self.folder(domain, split, name) / under / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        Image.new("RGB", (1, 1), (number % 256, number // 256, 7)).save(path, "PNG")
        self.expected[number], self.files[number] = (domain, split, name), path.relative_to(self.root).as_posix()

    def some(self) -> tuple[int, Path]:
        number = self.rng.choice(list(self.expected))
        return number, self.root / self.files[number]

    def stray(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            Image.new("RGB", (1, 1), (255, 255, 255)).save(path, "PNG")

    # ---- what people have beside their images

    def hidden(self) -> None:
        place = self.rng.choice([*list(self.some()[1].parents)[: len(self.levels) + 1]])
        name = ["._1.png", ".x.png", "Thumbs.db", "1.png~", ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/1.png"]
        name += ["@eaDir/1.png", ".cache/a/1.png", "lost+found/x/1.png", ".DS_Store", ".git/a/b/c/1.png"]
        self.stray(place / self.rng.choice(name))

    def other_files(self) -> None:
        place = self.some()[1].parent
        (place / "notes.txt").write_text("no image")
        (place.parent / "empty class").mkdir(exist_ok=True)
        (place / "empty.png").mkdir(exist_ok=True)
        (place.parent / "README").write_text("no folder")

    def no_file(self) -> None:
        path = self.some()[1].parent / self.rng.choice(["pipe.png", "a.JPG"])
        ways = [lambda: os.mkfifo(path), lambda: path.symlink_to("missing.png"), lambda: path.symlink_to("/dev/zero")]
        self.rng.choice([*ways, lambda: path.symlink_to(path)])()
        self.warnings.append(path.name)

    def loop(self) -> None:
        place = self.some()[1].parent
        above = [place, *list(place.parents)[: len(self.levels)], Path("/tmp")]
        (place / "again").symlink_to(self.rng.choice(above))
        self.warnings.append("again")

    def twin_file(self) -> None:
        number, path = self.some()
        name = self.rng.choice([path.name.swapcase(), path.name.replace(" ", "_"), path.name.replace("_", " ")])
        self.add(*self.expected[number], name)

    def odd_name(self) -> None:
        names = ["a b  c.png", "line\nbreak.png", "‮right.png", "ä.png", "a\u0308.png", "%41.png", "q'\".png"]
        self.add(*self.expected[self.some()[0]], self.rng.choice(names))

    def twin_class(self) -> None:
        domain, split, name = self.expected[self.some()[0]]
        ways = [name.upper() if name != "straße" else name, unicodedata.normalize("NFD", name), name.replace("_", " ")]
        other = self.rng.choice(ways)
        if other != name:
            self.add(domain, split, other, "twin.png")
            self.warnings.append(ascii(other)[1:-1])

    def twin_domain(self) -> None:
        domain, split, name = self.expected[self.some()[0]]
        other = self.rng.choice([unicodedata.normalize("NFD", domain), domain.swapcase(), domain.replace("_", " ")])
        if other != domain and "domain" in self.levels:
            self.add(other, split, name, "of twin.png")
            self.warnings.append(ascii(other)[1:-1])

    def nested(self) -> None:
        number, _ = self.some()
        self.stray(self.root / self.folder(*self.expected[number]) / "sub" / "nested.png")
        self.refuse("nested.png", "sub")

    def too_high(self) -> None:
        self.stray(self.root / self.rng.choice(["stray.png", "stray.png", "Art/stray.png"][: len(self.levels) + 1]))
        if self.levels != ["class"] or (self.root / "stray.png").exists():
            self.refuse("stray.png")

    def no_permission(self) -> None:
        path = self.rng.choice(list(self.some()[1].parents)[: len(self.levels) + 1])
        path.chmod(self.rng.choice([0o000, 0o300, 0o400]))
        self.drop_rights = True
        self.refuse(path.name)

    def undecodable(self) -> None:
        path = os.fsencode(self.some()[1].parent) + b"/\xe9.png"
        if self.rng.random() < 0.3:
            path = os.fsencode(self.some()[1].parent.parent) + b"/caf\xe9/1.png"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(self.some()[1].read_bytes())
        self.refuse("udce9", "xe9", "\udce9")

    def link_of_class(self) -> None:
        place = self.some()[1].parent
        (place.parent / "same class").symlink_to(place)
        self.refuse("same class")

    def refuse(self, *names: str) -> None:
        self.refusals += names
        self.must_refuse = True


HARMLESS = [Folder.hidden, Folder.hidden, Folder.other_files, Folder.twin_file, Folder.odd_name, Folder.twin_class]
HARMLESS += [Folder.no_file, Folder.loop, Folder.twin_domain]
HARMFUL = [Folder.nested, Folder.too_high, Folder.no_permission, Folder.undecodable, Folder.link_of_class]


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def rights(drop: bool) -> Iterator[None]:
    """Inside the block a process of root is one of nobody, who needs permissions."""
    if not drop or os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def number_in(row: dict) -> int:
    red, green, _ = Image.open(row["image"]["path"]).convert("RGB").getpixel((0, 0))
    return red + 256 * green


def trial(rng: random.Random, work: Path) -> None:
    log = Log()
    logging.getLogger("mmap_peft").addHandler(log)
    for path in (work, work.parent):
        path.chmod(0o755)
    folder = Folder(rng, work / rng.choice(["My images", "写真", "data"]))
    additions = rng.sample(HARMLESS, rng.randint(1, 3)) + rng.sample(HARMFUL, rng.choice([0, 0, 1]))
    for addition in additions:
        addition(folder)
    path = str(folder.root) + rng.choice(["", "/", "/."])
    with rights(folder.drop_rights):
        found = one_sentence(lambda: read_folder(path), *(folder.refusals or ["no error was expected"]))
    if found is None:
        return
    said = "\n".join(log.lines)
    assert not folder.must_refuse or any(name in said for name in folder.refusals), "a loss was passed over in silence"
    for name in folder.warnings:
        assert name in said, f"nothing was said of {name}"
    check_images(folder, found)
    check_tasks(folder, found)
    if folder.layout == "domain/class":
        check_lists(folder, found, work)


def check_images(folder: Folder, found: dict) -> None:
    seen = Counter()
    for domain, data in found.items():
        names = data.features["label"].names
        assert len(set(map(plain, names))) == len(names), "a class was read as two"
        for row in data:
            number = number_in(row)
            seen[number] += 1
            true_domain, _, name = folder.expected[number]
            assert plain(domain) == plain(true_domain), f"{row['file']} is in domain {domain}"
            assert plain(names[row["label"]]) == plain(name), f"{row['file']} is of class {names[row['label']]}"
            assert row["file"] == folder.files[number]
    assert seen == Counter(folder.expected.keys()), "images were lost or read twice"


def check_tasks(folder: Folder, found: dict) -> None:
    if "split" in folder.levels:
        split = splits.split_of_folders(found)
    else:
        split = splits.split_at_random(found, **folder.rng.choice([{"fraction": 0.5}, {"shots": 1}]), seed=3)
    tasks = splits.make_tasks(found, split)
    used = Counter()
    for task, domain in zip(tasks, split.train):
        for part, files in (("train", split.train[domain]), ("eval", split.eval[domain])):
            rows = list(getattr(task, part))
            assert [row["file"] for row in rows] == list(files), "a task has other images than the split says"
            for row in rows:
                number = number_in(row)
                used[number] += 1
                true = folder.expected[number][1].lower()
                assert not true or true.startswith("train") == (part == "train"), f"{row['file']} is in {part}"
                assert plain(task.class_names[row["label"]]) == plain(folder.expected[number][2])
        task.check_training_images()
    left = {number for number, (_, split_name, _) in folder.expected.items() if split_name.lower() == "val"}
    assert used == Counter(set(folder.expected) - left), "images were lost, or train and evaluate"


def check_lists(folder: Folder, found: dict, work: Path) -> None:
    """Published lists name files exactly, but for domains with a space, and files that only differ in case count."""
    rng, chosen = folder.rng, {}
    classes = sorted({name for _, _, name in folder.expected.values()}, key=plain)
    numbers = {plain(name): number for number, name in enumerate(dict.fromkeys(map(plain, classes)))}
    domains = {domain for domain, _, _ in folder.expected.values()}
    if len(numbers) < len(classes) or len(found) < len(domains) or any("\n" in file for file in folder.files.values()):
        return  # lists cannot name these
    lines: dict[tuple[str, str], list[str]] = {}
    twice = rng.random() < 0.3
    for number, file in folder.files.items():
        domain, _, name = folder.expected[number]
        part = chosen[number] = rng.choice(["train", "test"])
        listed = file.replace(domain, domain.replace(" ", "_"), 1)
        for each in ("train", "test"):
            lines.setdefault((domain, each), [])
        lines[domain, part].append(f"{listed} {numbers[plain(name)]}")
    if twice:
        file = listed.replace(".png", ".PNG") if listed.endswith(".png") else listed.replace(".PNG", ".png")
        twice = file.replace("_", " ") not in {other.replace("_", " ") for other in folder.files.values()}
        if twice:
            lines[domain, "test" if part == "train" else "train"].append(f"{file} {numbers[plain(name)]}")
    for (domain, part), each in lines.items():
        (work / "lists" / domain.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
        end, encoding = rng.choice(["\n", "\r\n"]), rng.choice(["utf-8", "utf-8-sig"])
        path = work / "lists" / domain.replace(" ", "_") / f"{part}_10.txt"
        path.write_bytes("".join(f"{line}{end}" for line in each).encode(encoding))

    def tasks() -> list:
        return splits.make_tasks(found, splits.read_lists(work / "lists", 0.1))

    made = one_sentence(tasks, repr(Path(file).name)[1:-1]) if twice else tasks()
    assert made is None or not twice, "an image trains and evaluates"
    for task in made or ():
        for part in ("train", "test"):
            for row in getattr(task, "train" if part == "train" else "eval"):
                assert chosen.pop(number_in(row)) == part, f"{row['file']} is not in {part}"
    assert made is None or not chosen, "images of the lists were lost"


CAMPAIGN = Campaign(trial, trials=100, few=12, seconds=30)
