"""Measures what an exported task costs beside the plain image features of the same CLIP.

    OMP_NUM_THREADS=1 python examples/measure_serving.py

The weights are random, of the shape of CLIP ViT-B/16; times do not depend on them. All functions are run in turn, and
medians are reported, so that other work on the machine affects all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from transformers import CLIPConfig, CLIPModel

from mmap_peft import MmAPConfig, MultiTaskClassifier, Task, TaskGrouping, load_processor
from mmap_peft.data.pictograms import CLASS_NAMES, small_clip


def make(layers: int) -> tuple[CLIPModel, MultiTaskClassifier]:
    """A random CLIP ViT-B/16 with `layers` layers in each tower, and a classifier of two grouped tasks on a copy."""
    processor = load_processor(small_clip())
    tokens = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(processor.tokenizer), "num_hidden_layers": layers, **tokens}
    vision = {"patch_size": 16, "num_hidden_layers": layers}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    tasks = [Task(name, CLASS_NAMES) for name in ("print", "photo")]
    classifier = MultiTaskClassifier(copy.deepcopy(clip), processor, tasks, MmAPConfig()).eval()
    classifier.set_grouping(TaskGrouping(["print", "photo"], [["print", "photo"]]))
    return clip, classifier


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each function in seconds; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what an exported task costs.")
    parser.add_argument("--batch", type=int, default=4, help="Number of images in a batch.")
    parser.add_argument("--layers", type=int, default=12, help="Encoder layers of a tower.")
    parser.add_argument("--repeats", type=int, default=15, help="Number of rounds.")
    arguments = parser.parse_args()

    clip, classifier = make(arguments.layers)
    pixels = torch.randn(arguments.batch, 3, 224, 224)
    task_ids = torch.zeros(arguments.batch, dtype=torch.long)
    served = classifier.export("print")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:

        def session(name: str) -> onnxruntime.InferenceSession:
            path = classifier.export("print", format="onnx", path=Path(folder) / f"{name}.onnx")
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
            return onnxruntime.InferenceSession(path, options)

        prompted = session("prompted")
        with classifier.zero_shot():
            plain = session("plain")
    feed = {"pixel_values": pixels.numpy()}

    seconds = median_seconds(
        {
            "plain image features, torch": lambda: clip.get_image_features(pixels),
            "classifier, torch": lambda: classifier(pixels, task_ids),
            "exported, torch": lambda: served(pixels),
            "exported without prompts, ONNX": lambda: plain.run(None, feed),
            "exported, ONNX": lambda: prompted.run(None, feed),
        },
        arguments.repeats,
    )
    difference = (torch.tensor(prompted.run(None, feed)[0]) - served(pixels)).abs().max().item()
    print(f"batch {arguments.batch}, {torch.get_num_threads()} thread(s); torch and ONNX differ by {difference:.1e}")
    print("\n| what | ms |\n|---|---:|")
    for name, taken in seconds.items():
        print(f"| {name} | {1000 * taken:.0f} |")


if __name__ == "__main__":
    main()
