"""Every Python block of README and docs runs, one after the other, as a reader would: with a few steps only."""

import re
from pathlib import Path

import pytest


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


def python(*pages: str) -> str:
    """The blocks of some pages as one program."""
    blocks = [re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL) for page in pages]
    assert all(blocks)
    code = "\n".join(block for page in blocks for block in page)
    code = code.replace("per_class=10", "per_class=4")
    return code.replace("output_dir=", f"**{SHORT!r}, output_dir=")


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("peft", "multitask", "methods", "data", "serving"))]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # as for two LoRA adapters
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python(page), page, "exec"), {})
