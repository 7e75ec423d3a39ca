"""Files are whole or not there, whoever else writes them."""

import copy
import os
import re
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tcp_core import Latency, fit, ladder, load, nets, save
from tcp_core.datasets import sources
from tcp_core.files import beside


def test_the_home_folder_may_be_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    batches = [(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))]
    assert save(model, "~/small.safetensors") == tmp_path / "small.safetensors"
    assert torch.equal(load(copy.deepcopy(model), "~/small.safetensors")[0].weight, model[0].weight)
    nets.load_weights(model, "~/small.safetensors")
    fit(model, batches, epochs=1, checkpoints="~/checkpoints", verbose=False)
    with pytest.raises(ValueError, match="too short"):
        ladder(model, batches, budgets=[{"macs": 0.5}], epochs=1, folder=Path("~/ladder"))
    assert Latency(lambda network: 1.0, table="~/table.json").table.path == tmp_path / "table.json"
    with pytest.raises(FileNotFoundError, match=re.escape(f"no folder {tmp_path / 'images'}")):
        sources.load("~/images")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "small.safetensors"]


@pytest.mark.parametrize(("use", "verb"), [(save, "save"), (load, "load into")])
def test_what_is_no_network_or_no_path_is_said_to_be(use, verb, tmp_path):
    model, path = nn.Linear(2, 2), tmp_path / "small.safetensors"
    with pytest.raises(TypeError, match="Linear given as a path; .* A network comes first, where there is one, then"):
        use(path, model)
    for wrong, said in (
        (model.state_dict(), "a OrderedDict, no network; build the network, give it these weights"),
        (nn.Linear, f"the class Linear, no network; call it, and {verb} the network that it returns"),
        (nets.build, "the function build, no network; call it"),
        (types.SimpleNamespace(model=model), f"a SimpleNamespace, no network; {verb} its .model"),
        (path, "Path, no network; the network comes first, then the path"),
        (None, f"a NoneType, no network; {verb} a network, a torch.nn.Module"),
    ):
        with pytest.raises(TypeError, match=said):
            use(wrong, path)


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


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "small.safetensors", tmp_path / "store" / "small.safetensors"
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no links")
    for _ in range(2):  # it leads nowhere at first
        save(nn.Linear(2, 2), link)
        assert link.is_symlink()
        assert target.is_file()
        assert not target.is_symlink()
    assert [path.name for path in target.parent.iterdir()] == [target.name]


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
