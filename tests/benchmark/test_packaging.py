"""The benchmark is run from a clone: neither the wheel nor its requirements know it."""

import ast
import configparser
import re
from pathlib import Path

import pytest
import setuptools


ROOT = Path(__file__).parents[2]
REQUIREMENTS = {"filelock": "filelock", "psutil": "psutil", "tqdm": "tqdm", "yaml": "pyyaml"}  # by what is imported


def test_the_wheel_holds_the_package_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    assert {name.partition(".")[0] for name in distribution.packages} == {"mmap_peft"}
    assert distribution.py_modules == ["mmap_peft_cli"]  # whose --help does not import the package


def imported(path):
    """The top-level packages that a file imports anywhere, relative imports left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("name", ["benchmark", *REQUIREMENTS])
def test_only_the_benchmark_imports(name):
    users = {
        path.relative_to(ROOT).parts[0]
        for folder in ("mmap_peft", "benchmark")
        for path in (ROOT / folder).rglob("*.py")
        if name in imported(path)
    }
    assert users == (set() if name == "benchmark" else {"benchmark"})  # which imports itself by relative imports


def test_what_only_the_benchmark_imports_is_no_requirement_of_the_package():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")

    def names(text):
        return {re.match(r"[\w-]+", line)[0] for line in text.splitlines() if line and not line.startswith("#")}

    assert not names(settings["options"]["install_requires"]) & set(REQUIREMENTS.values())
    assert names(settings["options.extras_require"]["benchmark"]) == set(REQUIREMENTS.values())
