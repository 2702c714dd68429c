"""Every Python block of README and docs runs, one after the other, as a reader would: with a few steps only.

Links and anchors are checked by `make site`.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

import mmap_peft


ROOT = Path(__file__).parents[1]
SHORT = {  # a few steps, no bar, no tracker
    "max_steps": 2,
    "grouping_steps": 2,
    "grouping_snapshots": 2,
    "snapshot_images": 4,
    "per_device_train_batch_size": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


ALL = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [page for page in ALL if blocks(page) and page != "docs/hub.md"]  # which tests/hub runs with a Hub of its own


def test_pages_with_code_are_found():
    assert {"README.md", "docs/coming-from.md", "docs/install.md", "docs/ten_minutes.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # as for two LoRA adapters
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page)).replace("per_class=10", "per_class=4")
    code = code.replace("output_dir=", f"**{SHORT!r}, output_dir=")
    exec(compile(code, page, "exec"), {})


def test_every_public_name_is_on_the_page_of_the_api():
    listed = re.findall(r"^::: mmap_peft\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(mmap_peft.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    listed = pages(settings["nav"])
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert len(listed) == len(set(listed))


def sentences(path: Path):
    """The strings of a file, with `…` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_that_are_explained_are_raised_in_these_words():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", page, flags=re.MULTILINE)
    raised = [each for path in (ROOT / "mmap_peft").rglob("*.py") for each in sentences(path)]
    unknown = []
    for words in quoted:
        fixed = re.compile(".*".join(re.escape(part.strip()) for part in words.split("…")), re.DOTALL)
        if not any(map(fixed.search, raised)):
            unknown.append(words)
    assert len(quoted) > 20
    assert unknown == ["KeyError: 'MMAP'"]  # which PEFT raises


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_to_files_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/extending.md", "docs/releasing.md"])
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:mmap_peft|tests|benchmark|docs|examples)/[\w./*]+)`", (ROOT / page).read_text())
    assert [name for name in named if "NAME" not in name and not list(ROOT.glob(name))] == []
