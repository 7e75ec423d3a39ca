"""Saving and loading tailored networks: round trips of many networks, and files that are refused."""

import contextlib
import copy
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import INPUT_SHAPE, RandomNet, networks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import counted, random_open

from tcp_core import FileError, Tailor, fit, load, nets, remove, save, storage, trace
from tcp_core.datasets import sources


def tailored(dense, x, share=0.5, seed=0):
    channels = trace(dense, x)
    return remove(dense, channels, random_open(channels, share, seed))


def outputs(model, x):
    with torch.no_grad():
        return tree_leaves(copy.deepcopy(model).eval()(x.clone()))


def assert_same(first, second, x):
    """The same weights and attributes, so the same outputs."""
    state = first.state_dict()
    assert list(state) == list(second.state_dict())
    for name, value in second.state_dict().items():
        assert torch.equal(state[name], value), name
    assert repr(first) == repr(second)  # tells groups, padding and widths
    for a, b in zip(outputs(first, x), outputs(second, x), strict=True):
        assert torch.equal(a, b)
    assert counted(first, x) == counted(second, x)


def ties(model):
    """Per parameter the first name it goes by."""
    first = {}
    return [first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)]


class Counting(nn.Conv2d):
    """Keeps something that is neither a parameter nor a buffer."""

    calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_extra_state_is_not_stored_and_said_so(tmp_path, images):
    small = tailored(nn.Sequential(Counting(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), images)
    with pytest.warns(RuntimeWarning, match="will not hold the extra state of '0'"):
        path = save(small, tmp_path / "small.safetensors")
    loaded = load(nn.Sequential(Counting(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), path)
    assert torch.equal(outputs(small, images)[0], outputs(loaded, images)[0])


@pytest.mark.parametrize("name", ["small.pt", "small", "small.safetensors.gz", "small.onnx"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"ends in '\S+'; it must end in \.safetensors, as such a file is written"):
        save(nn.Linear(2, 2), tmp_path / name)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def images():
    return torch.randn(2, 1, 8, 8)


@pytest.fixture
def small(images):
    return tailored(nets.small_resnet(widths=(8, 12, 16)), images)


@pytest.fixture
def path(small, tmp_path):
    return save(small, tmp_path / "small.safetensors")


def dense_resnet():
    return nets.small_resnet(widths=(8, 12, 16))


# -------------------------------------------------------------------------------------------------
# Round trips


def test_round_trip(small, path, images):
    dense = dense_resnet()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    loaded = load(dense, path)
    assert_same(small, loaded, images)
    assert type(loaded) is nets.ResNet
    assert loaded.conv1.out_channels == len(small.conv1.weight) < 8
    assert loaded.layer2[0].shortcut.padding == small.layer2[0].shortcut.padding
    # What it was loaded into is as it was.
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert dense.conv1.out_channels == 8
    assert dense.layer2[0].shortcut.padding == dense_resnet().layer2[0].shortcut.padding


@pytest.mark.medium
@given(network=networks(), seed=st.integers(0, 9), runs=st.integers(1, 3))
@settings(
    max_examples=15,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
def test_round_trips_of_random_networks(network, seed, runs, tmp_path):
    x = torch.randn(INPUT_SHAPE, dtype=torch.float64)
    small = network
    for run in range(runs):
        small = tailored(small, x, (seed + 1) / 10, seed + run)
    path = save(small, tmp_path / "random.safetensors")
    loaded = load(RandomNet(**network.arguments), path)
    assert_same(small, loaded, x)
    for (name, a), (_, b) in zip(small.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert ties(small) == ties(loaded)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ([("conv", {"width": 8}), ("twice", {"kind": "weight"})], "tied weights"),
        ([("conv", {"width": 8}), ("twice", {"kind": "module", "shared_norm": True})], "a module used twice"),
        ([("conv", {"width": 8}), ("buffered", {"persistent": False})], "a buffer outside the state"),
        ([("conv", {"width": 8}), ("buffered", {"persistent": True})], "a buffer"),
        ([("conv", {"width": 8}), ("depthwise", {"multiplier": 2})], "a depthwise convolution"),
        ([("conv", {"width": 8}), ("conv", {"width": 12, "groups": 4})], "a grouped convolution"),
        ([("conv", {"width": 8}), ("transposed", {"width": 8, "groups": 2})], "a grouped transposed convolution"),
        ([("conv", {"width": 8, "norm": "bn_plain"}), ("conv", {"width": 8, "act": "prelu"})], "no affine; PReLU"),
        ([("conv", {"width": 8, "norm": "groups_of_two"}), ("conv", {"width": 8, "norm": "instance"})], "other norms"),
        ([("conv", {"width": 8}), ("pad_channels_module", {}), ("conv", {"width": 8})], "padded channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_round_trips_of_special_layers(recipe, what, tmp_path):
    x = torch.randn(INPUT_SHAPE, dtype=torch.float64)
    dense = RandomNet([*recipe, ("conv", {"width": 6})])
    small = tailored(dense, x, share=0.4)
    assert repr(small) != repr(dense) or counted(small, x) != counted(dense, x)
    fresh = RandomNet([*recipe, ("conv", {"width": 6})])
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()  # what the file has must not come from the fresh network
    loaded = load(fresh, save(small, tmp_path / "special.safetensors"))
    assert_same(small, loaded, x)
    assert ties(small) == ties(loaded)


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_last_group_that_a_later_run_made_smaller(layer, tmp_path):
    def build():
        torch.manual_seed(0)
        grouped = layer(16, 32, 3, padding=1, groups=4)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(32, 4, 1))

    small, x, widths = build(), torch.randn(2, 3, 8, 8), []
    for _ in range(5):  # halves every family, as a ladder would
        channels = trace(small, x)
        open_units = torch.ones(channels.units, dtype=torch.bool)
        for family in channels.families:
            if channels.prunable[family.units].all():
                open_units[family.units[(len(family.units) + 1) // 2 :]] = False
        small = remove(small, channels, open_units)
        grouped = small[2]
        widths.append((grouped.in_channels, grouped.out_channels, grouped.groups))
        assert_same(small, load(build(), save(small, tmp_path / "small.safetensors")), x)
    assert widths == [(8, 16, 2), (4, 8, 1), (2, 4, 1), (1, 2, 1), (1, 1, 1)]


def test_groups_of_a_layer_whose_weight_is_computed(tmp_path):
    def build():
        grouped = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=4))
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), grouped)

    model, x = build(), torch.randn(2, 3, 8, 8)
    assert_same(model, load(build(), save(model, tmp_path / "dense.safetensors")), x)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def build():
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        model.append(nn.Conv2d(8, 4, 1))
        model[2].weight = model[1].weight
        return model

    x = torch.randn(2, 3, 8, 8)
    small = tailored(build(), x)
    path = save(small, tmp_path / "tied.safetensors")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert len({"1.weight", "2.weight"} & names) == 1
    loaded = load(build(), path)
    assert loaded[1].weight is loaded[2].weight
    assert loaded[1].weight is not loaded[3].weight
    assert_same(small, loaded, x)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet40_12"])
def test_round_trips_of_the_papers_networks(name, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    small = tailored(nets.build(name, num_classes=10), x)
    loaded = load(nets.build(name, num_classes=10), save(small, tmp_path / "network.safetensors"))
    assert_same(small, loaded, x)


def test_an_untouched_network_can_be_saved_too(images, tmp_path):
    dense = dense_resnet()
    assert_same(dense, load(dense_resnet(), save(dense, tmp_path / "dense.safetensors")), images)


def test_half_of_the_parameters_is_half_of_the_file(tmp_path):
    dense = nets.small_resnet(widths=(32, 64, 128))
    small = tailored(dense, torch.randn(2, 1, 8, 8), share=0.3)
    sizes = [save(model, tmp_path / f"{i}.safetensors").stat().st_size for i, model in enumerate((dense, small))]
    params = [sum(p.numel() for p in model.parameters()) for model in (dense, small)]
    assert 0.3 < params[1] / params[0] < 0.7
    assert sizes[1] / sizes[0] == pytest.approx(params[1] / params[0], abs=0.02)


def test_paths_may_be_text_and_folders_are_made(small, tmp_path):
    path = save(small, str(tmp_path / "a" / "b" / "small.safetensors"))
    assert path == tmp_path / "a" / "b" / "small.safetensors"
    assert load(dense_resnet(), str(path)).conv1.out_channels == small.conv1.out_channels


def test_saving_replaces_an_older_file_and_changes_nothing_in_the_network(small, path, images):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.no_grad():
        small.linear.bias.add_(1)
    save(small, path)
    assert_same(small, load(dense_resnet(), path), images)
    with torch.no_grad():
        small.linear.bias.sub_(1)
    torch.testing.assert_close(small.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_precision_of_the_dense_network_are_kept(small, path, dtype):
    loaded = load(dense_resnet().to(dtype), path)
    for name, value in loaded.state_dict().items():
        expected = small.state_dict()[name]
        assert value.dtype == (dtype if expected.is_floating_point() else expected.dtype)
        assert torch.equal(value, expected.to(value.dtype))


def test_gradients_and_modes_are_those_of_the_dense_network(path):
    dense = dense_resnet().eval()
    dense.conv1.weight.requires_grad_(False)
    loaded = load(dense, path)
    assert not any(module.training for module in loaded.modules())
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["conv1.weight"]


def test_a_loaded_network_can_be_trained(path, images):
    loaded = load(dense_resnet(), path).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(images).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    optimizer.step()


# -------------------------------------------------------------------------------------------------
# No pickle


def test_nothing_is_pickled_or_unpickled(small, tmp_path, images, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "dumps"),
        (pickle, "Unpickler"),
        (pickle, "_Unpickler"),
        (pickle, "Pickler"),
        (torch, "load"),
        (torch, "save"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    path = save(small, tmp_path / "small.safetensors")
    loaded = load(dense_resnet(), path)
    monkeypatch.undo()
    assert_same(small, loaded, images)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unread(tmp_path, zipped):
    path = tmp_path / "pickled.safetensors"
    torch.save({"weights": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        FileError, match=r"not a whole safetensors file .* pickle from torch\.save, which is never read"
    ):
        load(dense_resnet(), path)


# -------------------------------------------------------------------------------------------------
# Files that are refused


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent.* give the path that save\(\) returned"):
        load(dense_resnet(), tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(dense_resnet(), tmp_path)


@pytest.mark.medium
@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file(share, path, tmp_path):
    whole = path.read_bytes()
    for length in {int(share * len(whole)), int(share * 4_000), len(whole) - 1, 0, 7, 8, 9}:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"not a whole safetensors file .*truncated.* save the network again"):
            load(dense_resnet(), cut)


def test_a_file_without_widths(small, tmp_path):
    path = tmp_path / "plain.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file(small.state_dict(), path, metadata=metadata)
        with pytest.raises(FileError, match="not written by tcp_core.save: it has weights but no widths"):
            load(dense_resnet(), path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nets.small_resnet(widths=(8, 12, 16), blocks=2), r"only one of them has 'layer1\.1\..*'"),
        (
            lambda: nets.small_resnet(widths=(2, 12, 16)),
            r"is \(\d+, .*\) in the file and \(2, .*\) in the dense network",
        ),
        (lambda: nets.small_resnet(widths=(8, 12, 16), num_classes=4), r"'linear\.\w+' is \(10,.* and \(4,.*"),
        # larger in every dimension, so that each layer could be made as small as the file's
        (
            lambda: nets.small_resnet(widths=(8, 12, 16), num_classes=12),
            r"'linear.weight' is \(10, 16\) \(pruned to \(10, \d+\)\) in the file and \(12, 16\) in the dense network; "
            r"'linear.bias' is \(10,\) in the file and \(12,\) in the dense",
        ),
        (lambda: nets.small_resnet(widths=(8, 12, 20)), r"'layer3.* is .* in the file and \(20, .*; \d+ more differ"),
        (
            lambda: nets.small_resnet(widths=(8, 12, 16), in_channels=3),
            r"'conv1.weight' is \(8, 1, 3, 3\).*\(8, 3, 3, 3",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 8, 3)),
            r"a ResNet that does not fit this Sequential: only one of them has",
        ),
    ],
)
def test_a_file_of_another_network(path, other, message):
    with pytest.raises(FileError, match=message) as error:
        load(other(), path)
    assert "Build the network that was saved" in str(error.value)


def rewritten(path, *, change_tensors=None, change_spec=None, spec=None):
    """The file with some of its parts changed."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if change_tensors:
        change_tensors(tensors)
    if change_spec:
        spec = json.loads(metadata[storage.KEY])
        change_spec(spec)
        spec = json.dumps(spec)
    save_file(tensors, path, metadata={storage.KEY: spec or metadata[storage.KEY]})
    return path


def narrow(tensors):
    tensors["linear.bias"] = tensors["linear.bias"][:-1].clone()


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": "these are not widths"},
        {"spec": "[]"},
        {"change_spec": lambda spec: spec.update(version=99)},
        {"change_spec": lambda spec: spec.pop("shapes")},
        {"change_tensors": lambda tensors: tensors.pop("linear.weight")},
        {"change_tensors": narrow},
    ],
    ids=["no JSON", "no widths", "version", "no shapes", "weight missing", "weight of another size"],
)
def test_a_file_that_contradicts_itself(path, changes):
    with pytest.raises(FileError, match=r"small\.safetensors"):
        load(dense_resnet(), rewritten(path, **changes))


@pytest.mark.parametrize("shape", [(5, 4), (8, 3), (9, 4)])
def test_shapes_that_no_groups_have(shape, tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4, bias=False))

    def cut(tensors):
        tensors["2.weight"] = tensors["2.weight"][: shape[0], : shape[1]].clone()

    def say(spec):
        spec["shapes"]["2.weight"] = [*shape, 3, 3]
        spec["attributes"].pop("2")

    path = rewritten(save(build(), tmp_path / "a.safetensors"), change_tensors=cut, change_spec=say)
    with pytest.raises(FileError, match="'2' do not go together"):
        load(build(), path)


def test_an_untouched_network_of_another_head_is_refused_too(tmp_path):
    path = save(nets.small_resnet(widths=(8, 12, 16), num_classes=4), tmp_path / "four.safetensors")
    with pytest.raises(FileError, match=r"'linear.weight' is \(4, 16\) in the file and \(10, 16\)"):
        load(dense_resnet(), path)


@pytest.mark.medium
def test_a_network_knows_its_dense_shapes_wherever_it_goes(small, images, tmp_path):
    """Cut again, copied, pickled, loaded, and as a part of another."""
    torch.save(small, tmp_path / "pickled.pt")
    again = tailored(small, images, share=0.7)
    assert again.conv1.out_channels <= small.conv1.out_channels
    pickled = torch.load(tmp_path / "pickled.pt", weights_only=False)
    first = load(dense_resnet(), save(small, tmp_path / "first.safetensors"))
    for number, network in enumerate((again, copy.deepcopy(small), pickled, first)):
        path = save(network, tmp_path / f"{number}.safetensors")
        assert_same(network, load(dense_resnet(), path), images)
        stacked = save(nn.Sequential(nn.Identity(), network), tmp_path / "stacked.safetensors")
        assert_same(network, load(nn.Sequential(nn.Identity(), dense_resnet()), stacked)[1], images)
        part = save(network.layer2, tmp_path / "part.safetensors")
        assert load(dense_resnet().layer2, part)[0].conv1.out_channels == network.layer2[0].conv1.out_channels


@pytest.mark.medium
def test_a_tailored_run_s_network_can_be_saved_and_loaded(tmp_path):
    train, _, _ = sources.digits()
    model = dense_resnet()
    result = fit(model, train.split(len(train) - 320)[0], budget={"macs": 0.5}, epochs=6, batch_size=20)
    loaded = load(dense_resnet(), save(result.model, tmp_path / "small.safetensors"))
    assert_same(result.model, loaded, torch.randn(2, 1, 8, 8))


def test_a_file_that_is_cut_off_while_it_is_written_is_not_there(small, path, monkeypatch):
    whole = path.read_bytes()

    def fail(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(small, path)
    assert path.read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_of_version_1_is_named_as_that(path):
    def old(spec):
        spec["version"] = 1
        del spec["dense_shapes"], spec["sha256"]

    with pytest.raises(FileError, match="format version 1; this version reads 2. Files of version 1 do not say what"):
        load(dense_resnet(), rewritten(path, change_spec=old))


def test_a_failed_load_leaves_the_dense_network_alone(path):
    dense = nets.small_resnet(widths=(2, 12, 16))
    before = copy.deepcopy(dense.state_dict())
    with contextlib.suppress(FileError):
        load(dense, path)
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_another_number_of_groups_is_another_network(tmp_path):
    def build(groups):
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(groups, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))

    x, dense = torch.randn(2, 3, 8, 8), build(8)
    channels = trace(dense, x)
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[:2] = False
    path = save(remove(dense, channels, open_units), tmp_path / "a.safetensors")
    assert load(build(8), path)[1].num_groups == 6
    for groups in (2, 4, 16):
        with pytest.raises(FileError, match="num_groups of '1' to 6|'1' do not go together"):
            load(build(groups), path)
        with pytest.raises(ValueError, match="'1' has .* groups here and 8 in the trace"):
            remove(build(groups), channels, open_units)


def test_what_is_wrapped_is_saved_as_what_it_wraps(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)), torch.randn(2, 3, 8, 8)
    path = save(torch.compile(model), tmp_path / "a.safetensors")
    assert torch.equal(load(copy.deepcopy(model), path)(x), model(x))
    with pytest.raises(ValueError, match=r"this is a Tailor.*save what its finish\(\) returns"):
        save(Tailor(model, x, budget={"macs": 0.5}, steps=100), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


class Filling(nn.Module):
    """A network with buffers that its first forward pass makes: a map of places, and a number for each channel."""

    def __init__(self, persistent):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)
        self.register_buffer("places", None, persistent=persistent)
        self.register_buffer("seen", None, persistent=persistent)

    def forward(self, x):
        if self.places is None or self.places.shape != x.shape[-2:]:
            self.places = torch.linspace(0.5, 1, x.shape[-1]).expand(x.shape[-2:]).clone()
        x = self.first(x).relu() * self.places
        if self.seen is None:
            self.seen = torch.linspace(1, 2, x.shape[1])
        return self.head(self.second(x * self.seen[:, None, None]).relu().mean((2, 3)))


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("ran", [True, False])
def test_buffers_that_the_first_pass_fills(persistent, ran, tmp_path):
    torch.manual_seed(0)
    model, x = Filling(persistent), torch.randn(4, 3, 8, 8)
    tailor = Tailor(model, x[:2], budget={"macs": 0.4}, steps=96, multiple=1)
    assert model.places is model.seen is None  # as it was found
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(96):
        optimizer.zero_grad()
        tailor(x).square().mean().backward()
        optimizer.step()
        tailor.step()
    small = tailor.finish().eval()
    assert len(small.seen) == small.first.out_channels == 12  # of a size that the pass takes from its input
    assert small.second.out_channels < 12
    path = save(small, tmp_path / "small.safetensors")
    dense = Filling(persistent)
    if ran:
        dense(x)
    torch.testing.assert_close(load(dense, path).eval()(x), small(x), rtol=0, atol=0)
    assert (dense.seen is not None) == ran


def test_a_buffer_that_nothing_fills_is_another_network(tmp_path):
    path = save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), tmp_path / "small.safetensors")
    with pytest.raises(FileError, match=r"only one of them has '1\.num_batches_tracked'"):
        load(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), path)
