"""Tries an installed wheel: `python tests/release/smoke.py FOLDER`, the folder that it was installed into.

It is run as a script, so that the checkout is not on Python's path.
"""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import CLIPModel
from transformers.utils import logging

import mmap_peft
from mmap_peft.data.pictograms import CLASS_NAMES, draw, small_clip


def main(folder: str) -> None:
    logging.disable_progress_bar()
    package, wheel = Path(mmap_peft.__file__).resolve(), distribution("mmap_peft")
    assert package.is_relative_to(Path(folder).resolve()), f"{package} is not in {folder}"
    assert wheel.version == mmap_peft.__version__
    assert {path.parts[0] for path in wheel.files or () if path.suffix == ".py"} == {"mmap_peft", "mmap_peft_cli.py"}
    assert (package.parent / "py.typed").exists()
    for name in mmap_peft.__all__:
        getattr(mmap_peft, name)
    for command in wheel.entry_points.select(group="console_scripts"):
        code = f"import sys; from {command.module} import {command.attr} as main; sys.exit(main())"
        printed = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
        assert mmap_peft.__version__ in printed.stdout, command.name

    clip, names = str(small_clip()), list(CLASS_NAMES[:20])
    task = mmap_peft.Task("print", names)
    images = [draw("print", name, number) for name in names for number in range(2)]
    truth = [name for name in names for _ in range(2)]
    with TemporaryDirectory() as saved:
        classifier = make(clip, task, mmap_peft.MmAPConfig())
        before = classifier.predict(images, task="print").labels
        classifier.save_pretrained(saved)  # with a model card, whose template is a file of the wheel
        assert mmap_peft.MultiTaskClassifier.from_pretrained(saved).predict(images, task="print").labels == before
    found = make(clip, task, None).predict(images, task="print").labels
    accuracy = sum(one == other for one, other in zip(found, truth)) / len(truth)
    assert accuracy > 0.4, accuracy  # by chance 0.05
    print(f"mmap_peft {wheel.version} from {package.parent}: zero-shot accuracy {accuracy:.2f} of 20 classes")


def make(clip: str, task: mmap_peft.Task, config: mmap_peft.MmAPConfig | None) -> mmap_peft.MultiTaskClassifier:
    model = CLIPModel.from_pretrained(clip)
    return mmap_peft.MultiTaskClassifier(model, mmap_peft.load_processor(clip), [task], config).eval()


if __name__ == "__main__":
    main(sys.argv[1])
