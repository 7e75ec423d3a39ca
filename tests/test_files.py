"""Files are whole or not there, whoever else writes them."""

import os
import threading

import pytest
from torch import nn

from tcp_core import load, save
from tcp_core.files import beside


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "new" / "file"
    with beside(path) as first:
        first.write_text("first, half")
        with beside(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def stopped():
        with beside(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_is_named_before_anything_is_done(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"), beside(tmp_path):
        raise AssertionError
    with pytest.raises(OSError, match="cannot be written"), beside(tmp_path / "file" / "within"):
        raise AssertionError


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_saved_network_may_be_read_by_whom_other_files_may(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    path = save(nn.Linear(2, 2), tmp_path / "small.safetensors")  # safetensors' own files are for their owner alone
    assert path.stat().st_mode == plain.stat().st_mode


def test_every_process_may_save_the_same_network(tmp_path):
    path, model, errors = tmp_path / "small.safetensors", nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2)), []

    def work():
        try:
            for _ in range(10):
                save(model, path)
                load(model, path)
        except Exception as error:  # it would end in the thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == [path]
