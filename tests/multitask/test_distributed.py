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
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.testing import assert_close

from mmap_peft import TaskGrouping


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")

# Batches that a step is accumulated over, and what accelerate calls the launch.
LAUNCHES = {
    "single": (1, "NO"),
    "multi_cpu": (1, "MULTI_CPU"),
    "two_nodes": (2, "MULTI_CPU"),
    "fsdp2": (2, "FSDP"),
    "deepspeed_zero2": (2, "DEEPSPEED"),
}
FORKED = ["single", "two_nodes", "fsdp2"]  # the others are started by accelerate's own command, which is slower
SEVERAL = ["multi_cpu", "two_nodes", "fsdp2", pytest.param("deepspeed_zero2", marks=needs_deepspeed)]


def options(config):
    return ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0"]


def environment_of(config):
    """The arguments and the environment that accelerate gives to processes."""
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*options(config), "script.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


def environments(name):
    """The environment of each process of a launch: accelerate's, and that of torchrun."""
    if name == "single":
        return [{**environment_of(name)[1], "OMP_NUM_THREADS": "1"}]
    common = dict(os.environ) if name == "two_nodes" else environment_of(name)[1]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    nodes = name == "two_nodes"
    common["LOCAL_WORLD_SIZE"] = "1" if nodes else "2"
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(0 if nodes else rank), "GROUP_RANK": str(rank if nodes else 0)}
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def output(clip_folder, tmp_path_factory):
    """The folder that a launch wrote; each is launched once."""
    done = {name: tmp_path_factory.mktemp(name) for name in FORKED}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}

    def start(folder, *command):
        with (folder / "log").open("w") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=600).returncode
        logs = "\n".join(log.read_text()[-6000:] for log in folder.glob("log*"))
        assert code == 0, logs

    launches = [
        {"environments": environments(name), "arguments": [clip_folder, str(done[name]), LAUNCHES[name][0]]}
        for name in FORKED
    ]
    (done["single"] / "launches.json").write_text(json.dumps(launches))
    start(done["single"], sys.executable, "-m", "tests.multitask.fork_tiny", str(done["single"] / "launches.json"))

    def launch(name):
        if name not in done:
            folder = done[name] = tmp_path_factory.mktemp(name)
            script = [str(Path(__file__).with_name("train_tiny.py")), clip_folder, str(folder), str(LAUNCHES[name][0])]
            start(folder, sys.executable, "-m", "accelerate.commands.launch", *options(name), *script)
        return done[name]

    return launch


def assert_same_prompts(one, other, adapters=4):
    files = sorted(path.relative_to(one) for path in one.glob("*/adapter_model.safetensors"))
    assert len(files) >= adapters
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        for name, tensor in first.items():
            # Adam divides by the size of a gradient, so that roundings of the smallest ones show.
            assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_give_the_same_prompts_as_one(name, output):
    launch = json.loads((output(name) / "launch.json").read_text())
    assert launch == {"processes": 2, "kind": LAUNCHES[name][1], "sharded": name == "fsdp2"}
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


@pytest.mark.parametrize("name", ["single", "multi_cpu", "two_nodes", "fsdp2"])
def test_features_that_processes_keep_together_change_no_bit(name, output):
    computed, kept = (
        load_file(output(name) / each / "global" / "adapter_model.safetensors") for each in ("computed", "kept")
    )
    assert computed and all(torch.equal(kept[key], tensor) for key, tensor in computed.items())
    writers = {path.name.partition("-")[0] for path in (output(name) / "tmp").glob("mmap_peft-features-*/*/*.rows")}
    assert len(writers) == {"single": 1, "fsdp2": 0}.get(name, 2)


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
    args, environment = environment_of(config)
    assert args.multi_gpu == config.startswith("multi")
    assert expected.items() <= environment.items()
    assert args.num_processes == (1 if config == "single" else 2)


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*LAUNCHES, "multi_gpu"} - {"two_nodes"}
