"""However it is launched, the same training gives the same prompts."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.testing import assert_close

from mmap_peft import TaskGrouping


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
SCRIPT = str(Path(__file__).with_name("train_tiny.py"))
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def accelerate(config):
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0"]
    return [[sys.executable, "-m", "accelerate.commands.launch", *options]]


def two_nodes():
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    return [[sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]] * 2


# How to launch, batches that a step is accumulated over, and what accelerate calls it.
LAUNCHES = {
    "single": (lambda: accelerate("single"), 1, "NO"),
    "multi_cpu": (lambda: accelerate("multi_cpu"), 1, "MULTI_CPU"),
    "two_nodes": (two_nodes, 2, "MULTI_CPU"),
    "fsdp2": (lambda: accelerate("fsdp2"), 2, "FSDP"),
    "deepspeed_zero2": (lambda: accelerate("deepspeed_zero2"), 2, "DEEPSPEED"),
}
SEVERAL = ["multi_cpu", "two_nodes", "fsdp2", pytest.param("deepspeed_zero2", marks=needs_deepspeed)]


@pytest.fixture(scope="module")
def output(clip_folder, tmp_path_factory):
    """The folder that a launch wrote; each is launched once."""
    done = {}

    def launch(name):
        if name not in done:
            commands, accumulation, _ = LAUNCHES[name]
            folder = done[name] = tmp_path_factory.mktemp(name)
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
            running = []
            for number, command in enumerate(commands()):
                with (folder / f"log_{number}").open("w") as log:
                    arguments = [*command, SCRIPT, clip_folder, str(folder), str(accumulation)]
                    running.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
            try:
                codes = [process.wait(timeout=300) for process in running]
            finally:
                for process in running:
                    process.kill()
            logs = "\n".join((folder / f"log_{number}").read_text()[-6000:] for number in range(len(codes)))
            assert not any(codes), logs
        return done[name]

    return launch


def assert_same_prompts(one, other, adapters=4):
    files = sorted(path.relative_to(one) for path in one.glob("*/adapter_model.safetensors"))
    assert len(files) >= adapters
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        for name, tensor in first.items():
            assert_close(second[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_give_the_same_prompts_as_one(name, output):
    launch = json.loads((output(name) / "launch.json").read_text())
    assert launch == {"processes": 2, "kind": LAUNCHES[name][2], "sharded": name == "fsdp2"}
    assert_same_prompts(output("single"), output(name))


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_compute_the_same_prototypes(name, output):
    first, second = (load_file(output(each) / "prototypes.safetensors") for each in ("single", name))
    for key, tensor in first.items():
        assert_close(second[key], tensor, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("training", "adapters"), [("aggregated", 1), ("two stages", 3), ("caches", 3)])
@pytest.mark.parametrize("name", ["multi_cpu", "two_nodes", "fsdp2"])
def test_other_trainings_give_the_same_as_in_one_process(name, training, adapters, output):
    assert_same_prompts(output("single") / training, output(name) / training, adapters)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_train_on_the_same_augmented_images(name, output):
    one, two = (
        sorted(digest for path in output(each).glob("images_*.json") for digest in json.loads(path.read_text()))
        for each in ("single", name)
    )
    assert len(one) == 5 * 12
    assert one == two
    assert_same_prompts(output("single") / "augmented", output(name) / "augmented", adapters=1)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_losses_and_the_average_of_promptsrc_are_those_of_one_process(name, output):
    assert_same_prompts(output("single") / "regularized", output(name) / "regularized", adapters=1)


@pytest.mark.parametrize("name", ["single", *SEVERAL])
def test_resuming_gives_the_same_prompts(name, output):
    assert_same_prompts(output(name), output(name) / "resumed")


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_find_the_same_groups(name, output):
    one, two = (TaskGrouping.load(output(each) / "grouping" / "grouping.json") for each in ("single", name))
    assert one.groups == two.groups
    np.testing.assert_allclose(one.snapshots, two.snapshots, atol=1e-4)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_measure_the_same_accuracy(name, output):
    one, two = (json.loads((output(each) / "eval_results.json").read_text()) for each in ("single", name))
    for task in ("print", "clipart", "photo", "mean", "worst"):
        assert one[f"eval_{task}_accuracy"] == pytest.approx(two[f"eval_{task}_accuracy"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("single", {}),
        ("multi_cpu", {}),
        ("multi_gpu", {}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("deepspeed_zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    ],
)
def test_accelerate_understands_every_config(config, expected):
    arguments = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert args.multi_gpu == config.startswith("multi")
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    assert expected.items() <= environment.items()
    assert args.num_processes == (1 if config == "single" else 2)


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*LAUNCHES, "multi_gpu"} - {"two_nodes"}
