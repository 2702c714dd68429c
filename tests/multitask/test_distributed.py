import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmap_peft import TaskGrouping


ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("train_tiny.py"))


def run(processes, clip_folder, output):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, SCRIPT, clip_folder, str(output), "12"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def outputs(clip_folder, tmp_path_factory):
    return {count: run(count, clip_folder, tmp_path_factory.mktemp(f"processes_{count}")) for count in (1, 2)}


def test_two_processes_give_the_same_prompts_as_one(outputs):
    files = sorted(path.relative_to(outputs[1]) for path in outputs[1].glob("*/adapter_model.safetensors"))
    assert len(files) >= 4
    for file in files:
        one, two = load_file(outputs[1] / file), load_file(outputs[2] / file)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)


def test_two_processes_find_the_same_groups(outputs):
    one, two = (TaskGrouping.load(outputs[count] / "grouping" / "grouping.json") for count in (1, 2))
    assert one.groups == two.groups
    np.testing.assert_allclose(one.snapshots, two.snapshots, atol=1e-4)


def test_two_processes_measure_the_same_accuracy(outputs):
    one, two = (json.loads((outputs[count] / "eval_results.json").read_text()) for count in (1, 2))
    for name in ("print", "clipart", "photo", "mean", "worst"):
        assert one[f"eval_{name}_accuracy"] == pytest.approx(two[f"eval_{name}_accuracy"])
