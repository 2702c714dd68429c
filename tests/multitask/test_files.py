"""Files are replaced whole or not at all."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mmap_peft.multitask.files import read_json, replace_file, write_json


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "values.json"
    write_json({"a": 1}, path)
    with pytest.raises(KeyboardInterrupt), replace_file(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    with pytest.raises(FileNotFoundError), replace_file(path):
        pass  # nothing was written
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_writers_wait_for_each_other(tmp_path):
    path = tmp_path / "count.json"
    write_json({"count": 0}, path)

    def add(_):
        with replace_file(path) as new:
            new.write_text(f'{{"count": {read_json(path)["count"] + 1}}}')

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(8)))
    assert read_json(path) == {"count": 8}
    assert list(tmp_path.iterdir()) == [path]
