"""Try a model on a page in the browser: drop a picture, see its classes.

    mmap-peft app out/photos
    mmap-peft app me/clip-mmap-office --examples pictures --port 8000

The page shows the probabilities with and without training side by side, the accuracies and the
groups. Only this computer reaches it, unless --host or --share says otherwise. Ctrl-c ends it.
"""

from __future__ import annotations

import html
import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Optional

from annotated_types import Ge, Le

from ..checking import checked
from ..data.folders import short
from ..hub.markdown import MarkdownText
from ..hub.repository import shown_base
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.decoding import decode
from .info import info, percent, task_table, trained_parameters
from .parsing import CommandParser
from .predict import class_names_of, find_files, finds_tasks
from .reading import MODEL_HELP, read_model
from .report_pictures import heat_map


if TYPE_CHECKING:
    import gradio


Port = Annotated[int, Ge(1), Le(65535), "an integer from 1 to 65535"]
ANY = ("any", "")  # as shown, and its value
SHOWN = 5  # classes of an answer
LARGEST = "20mb"  # size of a picture that can be uploaded
KEPT = 3600  # seconds for which uploaded pictures stay on disk
MOST_EXAMPLES = 100
MOST_CLASSES = 1000  # other classes of one question


Shares = dict[str, float]


@dataclass
class AppArguments:
    """The arguments of the command."""

    examples: Optional[list[str]] = field(
        default=None, metadata={"help": "pictures to click on, at most 100: files, folders or patterns", "nargs": "+"}
    )
    port: Optional[int] = field(default=None, metadata={"help": "port; without, the first free one from 7860 on"})
    host: str = field(default="127.0.0.1", metadata={"help": "address; 0.0.0.0 lets other computers reach the page"})
    browser: bool = field(default=False, metadata={"help": "open the page in a browser"})
    share: bool = field(default=False, metadata={"help": "a public address for up to a week, by Gradio's servers"})


def main(argv: Sequence[str]) -> None:
    own, place, _ = CommandParser("mmap-peft app", [AppArguments], __doc__, {"model": MODEL_HELP}).parse(argv)
    check_gradio()
    _check_address(own.host, checked(own.port, Optional[Port], "port"))
    examples = find_files(own.examples or ())[:MOST_EXAMPLES]
    for file in examples:
        if not os.path.isfile(file):
            raise ValueError(f"{short(file)} is no file; give pictures, folders of pictures or patterns.")
    classifier, title = read_model(place.model), os.path.basename(os.path.abspath(place.model))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # the address is seen in a pipe or a log, too
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ctrl-c, so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="mmap_peft-app-") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # its own is one for all users, who can read it
        page = make_page(classifier, title, examples)
        options = {"inbrowser": own.browser, "share": own.share, "max_file_size": LARGEST}
        page.launch(server_name=own.host, server_port=own.port, **options)


def _check_address(host: str, port: int | None) -> None:
    """Raise an error if a page cannot have this address: Gradio would try for minutes."""
    if ":" in host:
        raise ValueError(f"{short(host)} is no name and no IPv4 address; write --host with one, such as 0.0.0.0.")
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        where = host if port is None else f"{host}, port {port}"
        reason = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror  # without the address
        raise OSError(f"The page cannot listen on {where} ({reason}); write another --host or --port.") from error


def check_gradio() -> None:
    """Raise an `ImportError` if Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The page needs the package gradio, which is missing; write pip install mmap_peft[app].")


def make_page(classifier: MultiTaskClassifier, title: str, examples: Sequence[str] = ()) -> gradio.Blocks:
    """A page on which to try a classifier. `make_page(...).launch()` serves it.

    Args:
        classifier (`MultiTaskClassifier`): the classifier.
        title (`str`): the page's heading.
        examples (`Sequence[str]`): picture files to click on.

    Raises:
        ImportError: Gradio is not installed.
    """
    check_gradio()
    import gradio  # here, since importing it takes seconds

    turn = threading.Lock()  # zero_shot() disables LoRA for all threads

    def answer(picture: str | None, task: str, others: str) -> tuple[Any, Any, str]:
        try:
            with turn:
                return classify(classifier, picture, task, others)
        except ValueError as error:
            raise gradio.Error(html.escape(str(error))) from error  # which may name what a visitor wrote

    found, names = info(classifier), choices(classifier)
    base = shown_base(found["base"]) or "a CLIP"
    about = f"{found['method']} on {_shown(base)}, parameters: {trained_parameters(found)}"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gradio.Markdown(f"# {_shown(title)}\n{about}")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(label="Picture", height=320)
                picture.preprocess = _file  # Gradio opens the file itself, and says "Error" if it is no picture
                task = gradio.Dropdown(names, value=names[0][1], label="Task")
                others = gradio.Textbox(label="Other classes", placeholder="cat, dog, ... instead of the task's")
            with gradio.Column():
                with gradio.Row():
                    trained = gradio.Label(label="Trained", num_top_classes=SHOWN)
                    plain = gradio.Label(label="Zero-shot", num_top_classes=SHOWN)
                tasks = gradio.Markdown()
        if examples:
            gradio.Examples(list(examples), picture)
        _show_training(classifier, found)
        asked = [picture.change, task.change, others.submit]
        gradio.on(asked, answer, [picture, task, others], [trained, plain, tasks])
    return page


def _show_training(classifier: MultiTaskClassifier, found: dict[str, Any]) -> None:
    """Accuracies and groups, from what `info` found, as tabs of the page that is being made."""
    import gradio

    with gradio.Tab("Accuracies"):
        head, rows = task_table(found)
        gradio.Dataframe(rows, headers=head, interactive=False)
    if found["groups"]:
        with gradio.Tab("Groups"):
            groups = [f"* {_shown(', '.join(group))}" for group in found["groups"]]
            gradio.Markdown("\n".join([*groups, "", *found["remarks"]]))
            if classifier.grouping.similarity is not None:
                gradio.HTML(f'<img src="{heat_map(classifier.grouping)}" alt="Affinity of the tasks">')


def _shown(name: str) -> str:
    """A name as Markdown shows it as it is: a model of the Hub may come from anybody."""
    return MarkdownText(name).__html__()


def _file(dropped: Any) -> str | None:
    return None if dropped is None else dropped.path


def choices(classifier: MultiTaskClassifier) -> list[tuple[str, str]]:
    """What can be chosen as the task of a picture, as shown and as `classify` takes it: `ANY` first, if there are
    prototypes of all tasks."""
    return [*([ANY] if finds_tasks(classifier) else []), *((name, name) for name in classifier.tasks)]


def classify(
    classifier: MultiTaskClassifier, picture: str | None, task: str, others: str = ""
) -> tuple[Shares | None, Shares | None, str]:
    """Classify a picture with and without what was trained.

    Args:
        classifier (`MultiTaskClassifier`): the classifier.
        picture (`str`, *optional*): the file.
        task (`str`): the name of its task; `""`: it is found by prototypes.
        others (`str`): classes to choose among instead of the task's, separated by commas; `""`: none.

    Returns:
        The probabilities of the classes, trained and zero-shot, and a line about the task that was found. Without a
        picture `None`, `None` and `""`.

    Raises:
        ValueError: the file is no picture, or `MultiTaskClassifier.predict` refuses the other classes.
    """
    if picture is None:
        return None, None, ""
    try:
        image = decode(picture)
    except ValueError as error:
        raise ValueError(f"The picture cannot be read: {error}.") from error
    names = [name for name in map(str.strip, (others or "").split(",")) if name] or None
    if names and not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(f"Write 2 to {MOST_CLASSES} other classes, separated by commas.")

    def predict() -> tuple[Any, Shares]:
        found = classifier.predict([image], task or None, class_names=names)
        classes = class_names_of(found, classifier, task, names)
        return found, dict(zip(classes, found.probabilities[0].tolist()))

    found, trained = predict()
    with classifier.zero_shot():
        plain = predict()[1]
    if task:
        return trained, plain, ""
    best, *likely = sorted(zip(found.task_probabilities[0].tolist(), classifier.tasks), reverse=True)[:SHOWN]
    shown = [best, *(each for each in likely if each[0] >= 0.01)]
    return trained, plain, "Task: " + ", ".join(f"{_shown(name)} {percent(share)}" for share, name in shown)
