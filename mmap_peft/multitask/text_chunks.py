"""How many texts are encoded at a time."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch


SHARE = 4  # texts may take this part of the memory: one of four
UNKNOWN = 8 * 2**30  # bytes, where the system does not tell how much memory it has


def texts_at_once(config: Any, tokens: int, itemsize: int, total: int) -> int:
    """How many texts a training step encodes at a time, if `text_chunk` is not given.

    These are as many as fit into a quarter of the memory, rounded down to a power of two, if a text takes `tokens *
    layers * (16 * width + 4 * intermediate_size)` numbers until its backward pass. Of these, with ViT-B/16, MmAP takes
    0.3, BitFit, bottleneck adapters and LoRA of queries and values 0.65 to 0.8, and LoRA of all linear layers with
    dropout 1.7, which is still less than half of the memory. The size of the chunks changes the last bits of
    gradients, and the same seed must give the same result. So the number depends on no memory that happens to be free,
    and not on the few megabytes by which the totals of like machines differ.

    Args:
        config: the config of the text tower.
        tokens (`int`): number of tokens of a text, padding included.
        itemsize (`int`): bytes of a number in the text tower.
        total (`int`): bytes of memory, see `total_memory`.
    """
    share = 2 ** ((total // SHARE).bit_length() - 1)
    numbers = tokens * config.num_hidden_layers * (16 * config.hidden_size + 4 * config.intermediate_size)
    return max(1, share // (numbers * itemsize))


@functools.cache
def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device. On a CPU: of the machine, or less if a cgroup of this process has a lower limit,
    divided by the number of processes that were launched together on the machine."""
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[1]
    machine = UNKNOWN
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *cgroup_limits()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cgroup_limits(root: Path = Path("/")) -> Iterator[int]:
    """The limits in bytes of the cgroups that this process is in, of version 2 or 1; `root` is that of all files."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount, file = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
            group = PurePosixPath(path)
            for each in (group, *group.parents):  # in a container, often only the last one is there
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    yield int((root / "sys/fs/cgroup" / mount / str(each).lstrip("/") / file).read_text())
