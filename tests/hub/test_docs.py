"""The page on the Hub does what it says."""

import re
from pathlib import Path


def test_the_blocks_of_the_page_run_in_their_order(client):
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    client.run("classifier = make()")
    assert len(blocks) == 6
    for block in blocks:
        client.run(block)
    assert client.run("answer = trial.adapters == before.adapters == classifier.adapters")
