"""Whatever an earlier version saved is loaded and computes what it did then. `record.py` says what the files are."""

from __future__ import annotations

import copy
import json
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import mmap_peft
from mmap_peft import MultiTaskClassifier, load_processor

from .outputs import classifier_outputs, load_base, peft_outputs
from .record import HERE, main


CLASSIFIERS = sorted(HERE.glob("*/*/classifier"))
PEFT_MODELS = sorted(HERE.glob("*/*/peft"))


def name(path: Path) -> str:
    return "-".join(path.relative_to(HERE).parts[:2])


@cache
def shared(version: Path) -> tuple:
    """The base, its processor and the inputs of a version."""
    base = load_base(version / "base")
    base.name_or_path = "base"  # as when it was recorded: PEFT warns of another name
    return base, load_processor(version / "base"), load_file(version / "inputs.safetensors")


def recorded(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder.with_suffix(".safetensors"))


def check(outputs: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    for key, output in outputs.items():
        torch.testing.assert_close(
            output, tensors[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("folder", CLASSIFIERS, ids=name)
def test_classifier(folder, tmp_path):
    base, processor, inputs = shared(folder.parents[1])
    tensors, saved = recorded(folder), json.loads((folder / "tasks.json").read_text())
    for path in (folder, tmp_path):
        classifier = MultiTaskClassifier.from_pretrained(path, model=copy.deepcopy(base), processor=processor)
        assert list(classifier.tasks) == [task["name"] for task in saved["tasks"]]
        check(classifier_outputs(classifier, inputs, tensors["task_ids"]), tensors)
        classifier.save_pretrained(tmp_path)


@pytest.mark.parametrize("folder", PEFT_MODELS, ids=name)
def test_peft_model(folder, tmp_path):
    base, _, inputs = shared(folder.parents[1])
    tensors = recorded(folder)
    texts = {key: tensors[key] for key in ("input_ids", "attention_mask")}
    for path in (folder, tmp_path):
        model = PeftModel.from_pretrained(copy.deepcopy(base), path)
        check(peft_outputs(model, inputs["pixel_values"], **texts), tensors)
        model.save_pretrained(tmp_path, save_embedding_layers=False)


@pytest.mark.parametrize("folder", CLASSIFIERS, ids=name)
def test_adapters_matter(folder):
    """A record in which adapters change little would hide a slip."""
    tensors = recorded(folder)
    finite = tensors["logits"].isfinite()
    change = (tensors["logits"] - tensors["zero_shot_logits"])[finite].abs()
    assert change.mean() > 0.05, change.mean()


def test_every_method_is_recorded():
    methods = {
        json.loads(path.read_text())["peft_type"] for path in HERE.glob("0.1.0/*/classifier/*/adapter_config.json")
    }
    prompts = {"MMAP", "COOP", "VPT", "IVLP", "MAPLE"}
    others = {"LINEAR_PROBE", "FULL_FINE_TUNING", "BITFIT", "BOTTLENECK_ADAPTER", "LORA", "LN_TUNING", "IA3"}
    assert methods == prompts | others


@pytest.mark.parametrize("changes, reason", [(" M README.md", "not committed"), ("", "is recorded in")])
def test_a_record_is_never_replaced(changes, reason, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=changes))
    monkeypatch.setattr(mmap_peft, "__version__", "0.1.0")
    before = sorted(HERE.iterdir())
    with pytest.raises(SystemExit, match=reason):  # a sentence, with which Python exits with status 1
        main()
    assert sorted(HERE.iterdir()) == before
