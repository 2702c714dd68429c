"""What `import mmap_peft` costs, who imports whom, how long files are, and what becomes of unknown keywords."""

import ast
import graphlib
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import mmap_peft
from mmap_peft import (
    MultiTaskClassifier,
    MultiTaskTrainer,
    ia3_config,
    ln_tuning_config,
    load_processor,
    lora_config,
)
from mmap_peft.data.domains import read_hub
from mmap_peft.keywords import check_keywords


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import sys, torch, transformers, peft, datasets\n"
        "before = set(sys.modules)\n"
        "import mmap_peft\n"
        "slow = {'matplotlib', 'scipy', 'torchjd', 'yaml', 'psutil'}\n"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] in slow))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# Each may import those before it.
ORDER = ["prompts", "tuner", "methods", "hub", "export", "multitask", "data", "commands"]
PACKAGE = Path(mmap_peft.__file__).parent


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_none_that_stands_above_it(package):
    above = ORDER[ORDER.index(package) + 1 :]
    imports = [
        f"{path.name}: {node.module}"
        for path in (PACKAGE / package).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))  # in functions and for type checking, too
        if isinstance(node, ast.ImportFrom) and node.level == 2 and (node.module or "").split(".")[0] in above
    ]
    assert imports == []


SOURCES = {
    path.relative_to(PACKAGE.parent).as_posix(): path.read_text("utf-8")
    for pattern in ("mmap_peft_cli.py", "mmap_peft/**/*.py", "benchmark/**/*.py")
    for path in sorted(PACKAGE.parent.glob(pattern))
}


def circle_of_imports(sources):
    """Files that import each other in a circle, or `None`. `sources` has the text of each file by its path."""
    path_of = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    imports = {path: set() for path in sources}
    for module, path in path_of.items():
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(sources[path])):  # in functions and for type checking, too
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = resolve_name("." * node.level + (node.module or ""), package)
                names = [f"{origin}.{alias.name}" for alias in node.names]
                names = [name if name in path_of else origin for name in names]
            imports[path].update(path_of[name] for name in names if name in path_of)
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_files_import_each_other_in_a_circle():
    assert "mmap_peft/multitask/classifier.py" in SOURCES and "benchmark/runner.py" in SOURCES
    assert circle_of_imports(SOURCES) is None


@pytest.mark.parametrize(
    "line",
    [
        "from . import one",
        "from .one import name",
        "from ..p.one import name",
        "from q.p import one",
        "import q.p.one as other",
        "def function():\n    from q.p.one import name",
        "if TYPE_CHECKING:\n    from .one import name",
    ],
)
def test_a_circle_of_imports_is_seen_however_they_are_written(line):
    files = {"q/p/__init__.py": "from .two import name", "q/p/one.py": "import os\nfrom .three import name"}
    files = {**files, "q/p/two.py": "from .one import name", "q/p/three.py": "from torch import nn"}
    assert circle_of_imports(files) is None
    assert set(circle_of_imports({**files, "q/p/three.py": line})) == {"q/p/one.py", "q/p/three.py"}
    assert set(circle_of_imports({**files, "q/p/three.py": "from . import name"})) == set(files)


def test_no_file_has_more_than_300_lines_and_no_function_more_than_45():
    long_files = {path: len(text.splitlines()) for path, text in SOURCES.items() if len(text.splitlines()) > 300}
    long_functions = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1
        for path, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 45
    }
    assert (long_files, long_functions) == ({}, {})


@pytest.mark.parametrize(
    ("call", "keyword", "close"),
    [
        (MultiTaskClassifier.from_pretrained, "revison", "revision"),
        (MultiTaskClassifier.from_pretrained, "sub_folder", "subfolder"),
        (MultiTaskClassifier.from_pretrained, "text_chunks", "text_chunk"),
        (MultiTaskClassifier.from_pretrained, "local_file_only", "local_files_only"),
        (MultiTaskClassifier.from_pretrained, "seed", None),
        (MultiTaskClassifier.from_pretrained, "dry_run", None),
        (MultiTaskClassifier.push_to_hub, "commit_mesage", "commit_message"),
        (MultiTaskTrainer, "callback", "callbacks"),
        (MultiTaskTrainer.train, "resume_from_checkpoints", "resume_from_checkpoint"),
        (load_processor, "cachedir", "cache_dir"),
        (lora_config, "lora_alfa", "lora_alpha"),
        (ln_tuning_config, "target_module", "target_modules"),
        (ia3_config, "feedforward_module", "feedforward_modules"),
        (read_hub, "cache", "cache_dir"),
    ],
)
def test_an_unknown_keyword_is_refused_by_its_name(call, keyword, close, tmp_path):
    hint = f"did you mean '{close}'" if close else "it takes "
    with pytest.raises(TypeError, match=rf"\(\) got an unknown keyword '{keyword}'; {hint}"):
        call(*([] if call.__name__.endswith("_config") else [tmp_path]), **{keyword: 1})


def test_keywords_that_a_function_hands_on_are_known():
    def receiver(first, second=2):
        return first, second

    @check_keywords(receiver, without=("second",))
    def function(third, **options):
        return third, options

    assert function(3, first=1) == (3, {"first": 1})
    for unknown in ("second", "third_"):
        with pytest.raises(TypeError, match=f"unknown keyword '{unknown}'"):
            function(3, **{unknown: 1})
