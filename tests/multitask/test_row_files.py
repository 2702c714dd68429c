"""Rows of bytes in files that processes and runs share."""

import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmap_peft.multitask import row_files
from mmap_peft.multitask.row_files import KEYS, ROWS, RowFiles, root_folder, used_bytes


SIZE = 100


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return root_folder()


def key(number):
    return number.to_bytes(16, "little")


def row(number):
    return memoryview(bytes([number + 1]) * SIZE)


def found(files, number):
    content = bytearray(SIZE)
    return bytes(content) if files.get(key(number), memoryview(content)) else None


def test_what_is_kept_comes_back_in_other_processes_and_runs():
    files = RowFiles("a", SIZE, 1e6)
    assert files.put(key(1), row(1)) and files.put(key(2), row(2))
    copy = pickle.loads(pickle.dumps(files))  # as in a worker
    assert copy.put(key(3), row(3))
    for each in (files, copy, RowFiles("a", SIZE, 1e6)):
        assert [found(each, number) for number in range(4)] == [None, *(bytes(row(number)) for number in (1, 2, 3))]
        assert len(each) == 3
    assert len(list(files.folder.glob(f"*{ROWS}"))) == 2  # each process writes its own
    assert RowFiles("b", SIZE, 1e6).folder != files.folder and found(RowFiles("b", SIZE, 1e6), 1) is None


def damage(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda rows, keys: damage(rows, SIZE + 7, b"\0"),
        lambda rows, keys: damage(keys, 20 + 18, b"\0\0"),
        lambda rows, keys: os.truncate(rows, 2 * SIZE - 1),  # a row that is not whole
        lambda rows, keys: os.truncate(keys, 2 * 20 - 1),
        lambda rows, keys: os.truncate(rows, 0),
    ],
    ids=["row", "checksum", "end of the rows", "end of the keys", "all rows"],
)
def test_a_damaged_row_is_missing_and_is_kept_anew(harm):
    files = RowFiles("a", SIZE, 1e6)
    for number in (0, 1):
        files.put(key(number), row(number))
    harm(next(files.folder.glob(f"*{ROWS}")), next(files.folder.glob(f"*{KEYS}")))
    del files
    for _ in range(2):  # in the second run the damaged row is still there
        files = RowFiles("a", SIZE, 1e6)
        assert found(files, 1) in (None, bytes(row(1)))
        files.put(key(1), row(1))
        assert found(files, 1) == bytes(row(1))
    assert found(RowFiles("a", SIZE, 1e6), 1) == bytes(row(1))


def test_a_key_that_is_kept_twice_is_written_once():
    files = RowFiles("a", SIZE, 1e6)
    for _ in range(3):
        assert files.put(key(0), row(0))
    assert used_bytes(files.folder) == SIZE + 20


def test_what_does_not_fit_is_not_kept(monkeypatch):
    files = RowFiles("a", SIZE, 2 * (SIZE + 20) + 50)
    assert [files.put(key(number), row(number)) for number in range(3)] == [True, True, False]
    assert found(files, 2) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=400))
    assert RowFiles("b", SIZE, 1e6).most_bytes == 2 * (SIZE + 20) + 100


def test_the_folder_that_was_not_used_for_the_longest_time_goes_if_nobody_has_it_open():
    for number, name in enumerate("abc"):
        files = RowFiles(name, SIZE, 1e6)
        files.put(key(0), row(0))
        os.utime(files.folder, (number, number))
    opened = RowFiles("a", SIZE, 1e6)  # now it is the last that was used
    os.utime(opened.folder, (0, 0))
    del files
    gc.collect()
    new = RowFiles("d", SIZE, 3 * (SIZE + 20), SIZE + 20)
    assert sorted(path.name for path in root_folder().iterdir()) == ["a", "c", "d"]
    assert new.put(key(0), row(0)) and not new.put(key(1), row(1))
    assert found(opened, 0) == bytes(row(0))


def test_a_full_disk_ends_nothing(monkeypatch, caplog):
    files = RowFiles("a", SIZE, 1e6)
    files.put(key(0), row(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        assert not files.put(key(1), row(1))
        assert not files.put(key(2), row(2))
    assert caplog.text.count("No space left") == 1
    assert found(files, 0) == bytes(row(0)) and found(files, 1) is None


def test_a_folder_of_another_user_is_not_used(monkeypatch, root, caplog):
    root.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)
    monkeypatch.setattr(row_files, "root_folder", lambda: root)
    with caplog.at_level(logging.WARNING):
        files = RowFiles("a", SIZE, 1e6)
    assert "another user" in caplog.text
    assert not files.put(key(0), row(0)) and found(files, 0) is None


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_believed(root):
    # The packages are made by hand, since importing this library takes seconds.
    code = (
        "import os, sys, types\n"
        "for name, path in (('mmap_peft', sys.argv[1]), ('mmap_peft.multitask', sys.argv[1] + '/multitask')):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "from mmap_peft.multitask.row_files import RowFiles\n"
        "import mmap_peft.multitask.row_files as module\n"
        "files = RowFiles('a', 100, 1e6)\n"
        "files.put(bytes(16), memoryview(b'x' * 100))\n"
        "write = os.pwrite\n"
        "def half(file, content, offset):\n"
        "    write(file, content[:len(content) // 2], offset)\n"
        "    os.kill(os.getpid(), 9)\n"
        "os.pwrite = half\n"
        "files.put(b'1' * 16, memoryview(b'y' * 100))\n"
    )
    package = str(Path(sys.modules[RowFiles.__module__].__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, package], env={**os.environ, "TMPDIR": str(root.parent)})
    assert done.returncode == -9
    files, content = RowFiles("a", SIZE, 1e6), bytearray(SIZE)
    assert files.get(bytes(16), memoryview(content)) and content == b"x" * SIZE
    assert not files.get(b"1" * 16, memoryview(content))
    files.put(b"1" * 16, memoryview(b"y" * SIZE))
    assert files.get(b"1" * 16, memoryview(content)) and content == b"y" * SIZE
