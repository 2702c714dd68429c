import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
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


@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)"], ids=["ends", "is killed"])
def test_the_file_goes_with_its_process(end):
    # The packages are made by hand, since importing this library takes seconds.
    code = (
        "import sys, types\n"
        "for name, path in (('mmap_peft', sys.argv[1]), ('mmap_peft.multitask', sys.argv[1] + '/multitask')):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "from mmap_peft.multitask.image_cache import ImageCache\n"
        "cache = ImageCache(1, (2,), 99)\n"
        "print(cache.path.parent, flush=True)\n"
        f"{end}"
    )
    package = str(Path(sys.modules[ImageCache.__module__].__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("mmap_peft_")
    assert folder.exists() == bool(end)
    own = ImageCache(1, SHAPE, 1e6), ImageCache(1, SHAPE, 1e6)  # the next ones remove what is left, but not each other
    assert not folder.exists()
    assert all(cache.path.exists() for cache in own)


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


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_where_no_file_can_be_made_nothing_is_kept_and_nothing_stops(folder, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    with caplog.at_level(logging.WARNING):
        cache = ImageCache(2, SHAPE, 1e6)
        cache.put(0, pixels(0))
    assert cache.get(0) is None
    assert caplog.text.count("No more images are kept") == 1


def test_a_file_that_was_cut_gives_nothing():
    cache = ImageCache(2, SHAPE, 1e6)
    cache.put(1, pixels(1))
    cache.get(1)
    os.truncate(cache.path, 70)
    assert cache.get(1) is None
