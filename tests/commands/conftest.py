"""A folder of pictures, and a model that the command trains on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from mmap_peft.data.pictograms import draw
from mmap_peft_cli import main


CLASSES = ("sun", "cloud", "star")
QUIET = ("--use_cpu", "--disable_tqdm", "True")
SHORT = (*QUIET, "--max_steps", "4", "--grouping_steps", "4", "--grouping_snapshots", "2", "--snapshot_images", "6")
SHORT += ("--per_device_train_batch_size", "6")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No progress bar, and none of the environment's choice of columns."""
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("COLUMNS", "100")
    yield
    transformers.utils.logging.enable_progress_bar()


def draw_folder(folder: Path, styles: tuple[str, ...], classes: tuple[str, ...] = CLASSES, per_class: int = 5) -> str:
    """A folder style/class/image, or class/image for one style."""
    for style in styles:
        for name in classes:
            place = folder / style / name if len(styles) > 1 else folder / name
            place.mkdir(parents=True)
            for number in range(per_class):
                draw(style, name, number).save(place / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> str:
    """A folder with two styles, three classes, and five pictures of each."""
    return draw_folder(tmp_path_factory.mktemp("data") / "pictures", ("print", "photo"))


@pytest.fixture(scope="session")
def trained(pictures, clip_folder, tmp_path_factory) -> str:
    """A model that `mmap-peft train` trained on `pictures`, which no test may change."""
    output = str(tmp_path_factory.mktemp("trained") / "model")
    assert main(["train", pictures, "--model", clip_folder, "--output_dir", output, "--license", "mit", *SHORT]) == 0
    return output


@pytest.fixture
def call(capsys):
    """Runs a command; returns its exit code, and what it printed on stdout and on stderr."""

    def run(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(each) for each in argv])
        return (code, *capsys.readouterr())

    return run
