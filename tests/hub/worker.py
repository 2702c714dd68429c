"""Runs Python that comes in lines of JSON on stdin, and answers each with one line of JSON on stdout.

`huggingface_hub` reads `HF_ENDPOINT` once, when it is imported: a process of its own has a Hub of its own.
"""

from __future__ import annotations

import json
import sys


answers, sys.stdout = sys.stdout, sys.stderr
names: dict = {}
for line in sys.stdin:
    answer = {}
    try:
        exec(json.loads(line), names)
        answer["value"] = names.pop("answer", None)
    except Exception as error:
        answer = {"error": type(error).__name__, "sentence": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
