"""What `import mmap_peft` costs, who imports whom, and what functions do with keywords that they do not know."""

import ast
import subprocess
import sys
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


ORDER = ["prompts", "tuner", "methods", "hub", "export", "multitask", "data"]  # each may import those before it
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
