"""A Hub on loopback, and a process that has it for its Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .server import Hub


SETUP = """
import sys, torch
from pathlib import Path
from peft import PeftModel, get_peft_model
from transformers import CLIPModel
from mmap_peft import *
from mmap_peft.data.pictograms import draw, small_clip

images = [draw("print", "sun", number) for number in range(2)]
processor = load_processor(small_clip())

def tasks(dataset=None):
    classes = {"print": ["sun", "cloud", "star"], "photo": ["sun", "cloud", "star", "heart"]}
    return [Task(name, names, dataset=dataset) for name, names in classes.items()]

def make(seed=0, base="me/clip", dataset=None):
    config = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
    clip = CLIPModel.from_pretrained(base)
    made = MultiTaskClassifier(clip, processor, tasks(dataset), config, seed=seed)
    made.set_grouping(TaskGrouping.by_mode("all", list(made.tasks)), seed=seed)
    return made.eval()

def probabilities(classifier):
    return {name: classifier.predict(images, name).probabilities.tolist() for name in classifier.tasks}
"""


class Client:
    """A process with a Hub and a cache of its own, which runs what it is told."""

    def __init__(self, hub: Hub, home: Path) -> None:
        root = Path(__file__).parents[2]
        self.cache = home / "hub"
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "mine",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the protocol of before, which every Hub speaks
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(root),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=home,
        )

    def ask(self, code: str) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, code: str) -> Any:
        """Run code and return what it assigns to `answer`."""
        found = self.ask(code)
        assert "error" not in found, f"{found}\n{code}"
        return found["value"]

    def fail(self, code: str, error: str = "OSError") -> str:
        """Run code that must raise this error, and return its sentence."""
        found = self.ask(code)
        assert found.get("error") == error, f"{found}\n{code}"
        return found["sentence"]

    def wipe_cache(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)


@pytest.fixture(scope="session")
def hub() -> Hub:
    """Knows the tokens of two users, me and you."""
    hub = Hub({"mine": "me", "yours": "you"})
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="session")
def client(hub, clip_folder, tmp_path_factory) -> Client:
    """A process of user me. The base is on the Hub as `me/clip`."""
    client = Client(hub, tmp_path_factory.mktemp("home"))
    client.run(SETUP)
    client.run(f"base = {clip_folder!r}")
    client.run("CLIPModel.from_pretrained(base).push_to_hub('me/clip'); processor.push_to_hub('me/clip')")
    yield client
    client.process.communicate(timeout=30)
