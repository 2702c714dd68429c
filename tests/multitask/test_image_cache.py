import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmap_peft.multitask.image_cache import ImageCache


SHAPE = (3, 4, 5)


def pixels(number):
    return np.full(SHAPE, number + 1, np.uint8)


def test_what_is_kept_comes_back():
    cache = ImageCache(3, SHAPE, 1e6)
    cache.put(1, pixels(1))
    assert np.array_equal(cache.get(1), pixels(1))
    assert cache.get(0) is None
    assert cache.get(2) is None


def test_a_row_that_is_not_whole_is_not_read():
    cache = ImageCache(1, SHAPE, 1e6)
    cache.put(0, pixels(0))
    with open(cache.path, "r+b") as file:
        file.write(b"\0")  # as before its mark is written
    assert cache.get(0) is None


def test_the_first_images_are_kept_as_far_as_bytes_and_disk_go(monkeypatch):
    row = 1 + 3 * 4 * 5
    assert [ImageCache(9, SHAPE, most).count for most in (0, row - 1, 3 * row, 99 * row)] == [0, 0, 3, 9]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 2 * row))
    cache = ImageCache(9, SHAPE, 99 * row)
    cache.put(1, pixels(1))
    cache.put(2, pixels(2))
    assert cache.get(1) is not None
    assert cache.get(2) is None


def test_a_copy_in_another_process_shares_the_file():
    cache = ImageCache(2, SHAPE, 1e6)
    cache.put(0, pixels(0))
    cache.get(0)  # the file is open here
    copy = pickle.loads(pickle.dumps(cache))
    copy.put(1, pixels(1))
    assert np.array_equal(copy.get(0), pixels(0))
    assert np.array_equal(cache.get(1), pixels(1))
    del copy
    gc.collect()
    assert cache.path.exists()


def test_the_file_goes_with_its_cache():
    cache = ImageCache(1, SHAPE, 1e6)
    folder = cache.path.parent
    assert folder.exists()
    del cache
    gc.collect()
    assert not folder.exists()


def test_the_file_goes_with_its_process():
    code = (
        "import runpy, sys; cache = runpy.run_path(sys.argv[1])['ImageCache'](1, (2,), 99); print(cache.path.parent)"
    )
    file = sys.modules[ImageCache.__module__].__file__
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("mmap_peft_")
    assert not folder.exists()


# Python 3.12 warns of any fork beside threads, which torch has
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_leaves_the_file():
    cache = ImageCache(1, SHAPE, 1e6)
    folder = cache.path.parent
    child = os.fork()
    if not child:
        del cache
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.exists()


def test_without_its_file_nothing_is_kept_and_nothing_stops(caplog):
    cache = ImageCache(1, SHAPE, 1e6)
    shutil.rmtree(cache.path.parent)
    with caplog.at_level(logging.WARNING):
        cache.put(0, pixels(0))
        cache.put(0, pixels(0))
    assert cache.get(0) is None
    assert caplog.text.count("No more images are kept") == 1
