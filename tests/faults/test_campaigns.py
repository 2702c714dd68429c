"""A few trials of each campaign of seeded faults; `make faults` runs many."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")
def test_few_trials_of_each_campaign():
    command = [sys.executable, "-m", "tests.faults", "--few", "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
