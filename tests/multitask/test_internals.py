"""docs/internals.md lists what is used of the insides of transformers and accelerate, and nothing else is used."""

import ast
import inspect
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import transformers.trainer
from packaging.requirements import Requirement
from packaging.version import Version

from mmap_peft import MultiTaskTrainer
from mmap_peft.multitask.grouping_stage import SharedAdapterTrainer


ROOT = Path(__file__).parents[2]
TABLES = [
    re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    for table in (ROOT / "docs" / "internals.md").read_text().split("|---|---|")[1:]
]
PROSE = (ROOT / "docs" / "internals.md").read_text().partition("Public methods")[2].partition("All else")[0]
FILES = (
    *(
        "arguments",
        "augmented_steps",
        "cached_steps",
        "checkpoints",
        "grouping_stage",
        "processes",
        "regularized_trainer",
    ),
    *("task_trainer", "trainer"),
)


def overridden():
    """Names that our classes define and `Trainer`, too."""
    classes = {*MultiTaskTrainer.__mro__, *SharedAdapterTrainer.__mro__} - {*transformers.Trainer.__mro__}
    names = {name for each in classes for name in vars(each) if callable(vars(each)[name])}
    return {name for name in names if hasattr(transformers.Trainer, name) and not name.startswith("__")}


def private_names():
    """Private attributes that our trainers' files use, and those of them that they define."""
    used, defined = set(), set()
    for file in FILES:
        for node in ast.walk(ast.parse((ROOT / "mmap_peft" / "multitask" / f"{file}.py").read_text())):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                used.add(node.attr)
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    defined.add(node.attr)
            elif isinstance(node, ast.FunctionDef) and re.match("_[a-z]", node.name):
                defined.add(node.name)
    return used, defined


def test_private_methods_that_are_overridden():
    assert {name for name in overridden() if name.startswith("_")} == set(TABLES[0])


def test_public_methods_that_are_overridden():
    assert {name for name in overridden() if not name.startswith("_")} == set(re.findall(r"`([a-z_]+)`", PROSE))


def test_private_attributes_that_are_used():
    used, defined = private_names()
    assert used - defined == set(TABLES[1])


def test_no_private_name_of_ours_is_one_of_the_trainers():
    source = inspect.getsource(transformers.trainer)
    _, defined = private_names()
    assert {name for name in defined if re.search(rf"\b{name}\b", source)} == set(TABLES[0])


@pytest.mark.parametrize("package", ["transformers", "accelerate", "peft"])
def test_versions_are_bounded_to_the_tested_minor_version(package):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    bounds = next(Requirement(line) for line in lines if Requirement(line).name == package).specifier
    constraints = (ROOT / "constraints.txt").read_text()
    versions = [Version(text) for text in re.findall(rf"^{package}==([\d.]+)", constraints, re.MULTILINE)]
    newest = max(versions)
    assert all(version in bounds for version in versions)
    assert f"{newest.major}.{newest.minor + 1}.0" not in bounds
