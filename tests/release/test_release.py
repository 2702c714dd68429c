"""What a release says of itself agrees with what was run, and with the code."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import mmap_peft


if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None


ROOT = Path(__file__).parents[2]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")


def requirements(text):
    """Requirements by name; lines of comments are left out."""
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.replace("_", "-"): requirement.specifier for requirement in parsed}


LOWEST = requirements((ROOT / "constraints-lowest.txt").read_text())
RUN = requirements(SETTINGS["options"]["install_requires"])
BENCHMARK = requirements(SETTINGS["options.extras_require"]["benchmark"])


def version(text):
    """`4.0.0` and `4` are the same version."""
    return re.sub(r"(\.0)+$", "", text)


@pytest.mark.parametrize("name", [*RUN, *BENCHMARK])
def test_the_lower_bounds_are_the_versions_that_are_run(name):
    (lower,) = [each.version for each in {**RUN, **BENCHMARK}[name] if each.operator == ">="]
    (run,) = [each.version for each in LOWEST[name]]
    assert version(lower) == version(run)


def test_the_pinned_versions_are_within_the_bounds():
    pinned = requirements((ROOT / "constraints.txt").read_text())
    for name, bounds in {**RUN, **BENCHMARK}.items():
        (found,) = [each.version for each in pinned[name]]
        assert bounds.contains(found), name


def test_the_classifiers_are_those_of_the_workflow():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = re.findall(r"Python :: (3\.\d+)", SETTINGS["metadata"]["classifiers"])
    assert versions == workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert SETTINGS["options"]["python_requires"] == f">={versions[0]}"


def test_the_citation_has_the_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == mmap_peft.__version__
    assert cited["preferred-citation"]["title"] in mmap_peft.MmAPConfig.method.source
    assert str(cited["preferred-citation"]["year"]) in mmap_peft.MmAPConfig.method.source


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_of_the_repository_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.skipif(tomllib is None, reason="Python 3.10 reads no TOML")
def test_mypy_checks_every_module_of_a_public_name():
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    tree = ast.parse((ROOT / "mmap_peft" / "__init__.py").read_text())
    modules = [node.module.replace(".", "/") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert len(modules) > 20
    assert [each for each in modules if not any(f"mmap_peft/{each}.py".startswith(part) for part in checked)] == []
