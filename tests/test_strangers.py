"""Files of strangers: whatever a file says, it is refused or gives a network of the architecture that was built."""

import copy
import json
import os
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from zoo import random_open

from tcp_core import FileError, load, nets, remove, save, storage, trace

MEGABYTES = 100
"""By how much the process may grow while it loads a file; the network has 0.1."""


SEED = 1
"""With it, units leave everywhere: groups, padding and shapes all differ from the dense network's."""


def build():
    torch.manual_seed(0)
    f = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=8)),
        *(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 1)),
    )
    model = nn.Sequential()
    model.f = f
    model.net = nets.small_resnet(widths=(8, 12, 16))
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model, x = build(), torch.randn(2, 1, 8, 8)
    channels = trace(model, x)
    small = remove(model, channels, random_open(channels, 0.5, SEED))
    assert 1 < small.f[3].groups < 8
    assert small.net.layer2[0].shortcut.padding != model.net.layer2[0].shortcut.padding
    return save(small, tmp_path_factory.mktemp("files") / "small.safetensors")


def read(path):
    """(spec, tensors)"""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[storage.KEY]), {name: file.get_tensor(name) for name in file.keys()}


def written(path, spec, tensors):
    """The file of somebody who knows the format: with the right hash."""
    spec = {key: value for key, value in spec.items() if key != "sha256"}
    spec["sha256"] = storage._digest(spec, tensors)
    save_file(tensors, path, metadata={storage.KEY: json.dumps(spec)})
    return path


SIZES = {"in_channels", "out_channels", "num_features", "in_features", "out_features", "groups", "dense_shapes"}


def assert_of_the_architecture(model):
    """What is not a size is as in the network that the user built, and sizes are no larger."""
    for (name, dense), (_, module) in zip(build().named_modules(), model.named_modules(), strict=True):
        assert type(module) is type(dense)
        here, there = vars(module), vars(dense)
        assert here.keys() - SIZES == there.keys() - SIZES, name
        for key, value in there.items():
            if isinstance(value, int) and key in SIZES:
                assert 1 <= here[key] <= value
            elif key == "padding" and isinstance(module, nn.modules.padding._ConstantPadNd):
                assert all(0 <= a <= b for a, b in zip(here[key], value, strict=True))
            elif not key.startswith("_") and key not in SIZES:
                assert here[key] == value, (name, key)


@pytest.mark.parametrize(
    ("module", "said", "message"),
    [
        ("f.1", {"eps": 1e9}, "sets 'eps' of module 'f.1': only groups"),
        ("f.1", {"eps": 1}, r"sets 'eps' of module 'f.1': only groups, and the padding of padding"),
        ("f.0", {"padding_mode": "circular"}, "sets 'padding_mode' of module 'f.0'"),
        ("f.0", {"stride": [2, 2]}, "sets 'stride' of module 'f.0'"),
        ("f.0", {"padding": [40000, 40000]}, "sets 'padding' of module 'f.0'"),
        ("f.0", {"groups": 1}, "sets 'groups' of module 'f.0'"),
        ("f.2", {"forward": None}, "sets 'forward' of module 'f.2'"),
        ("f", {"_modules": {}}, "sets '_modules' of module 'f'"),
        ("", {"training": 0}, "sets 'training' of module ''"),
        ("f.3", {"groups": 8}, r"sets groups of 'f.3' to 8, where its weights have \d"),
        ("f.3", {"groups": True}, "sets groups of 'f.3' to True"),
        ("f.3", {"groups": 0}, "sets groups of 'f.3' to 0"),
        ("f.3", {"groups": "4"}, "sets groups of 'f.3' to 4"),
        ("f.3", {}, "sets groups of 'f.3' to 1"),
        ("f.3", None, "sets None of module 'f.3'"),
        ("net.layer2.0.shortcut", {"padding": [0, 0, 0, 0, 40000, 40000]}, "sets padding of .*shortcut. to"),
        ("net.layer2.0.shortcut", {"padding": [0, 0, 0, 0, -1, 2]}, "amounts of channels can only become smaller"),
        ("net.layer2.0.shortcut", {"padding": [0, 0, 1, 0, 2, 2]}, "amounts of channels can only become smaller"),
        ("net.layer2.0.shortcut", {"padding": [0, 0, 0, 0, 2]}, "sets padding"),
        ("net.layer2.0.shortcut", {"padding": [0, 0, 0, 0, True, 2]}, "sets padding"),
        ("net.layer2.0.shortcut", {"padding": "000022"}, "sets padding"),
        ("net.layer2.0.shortcut", {"value": 1}, "sets 'value'"),
        ("net.layer2.0.shortcut", {}, "sets padding of 'net.layer2.0.shortcut' to None"),
        ("elsewhere", {"groups": 2}, "only the file has the module 'elsewhere'"),
    ],
)  # fmt: skip
def test_attributes_that_a_file_may_not_set(path, tmp_path, module, said, message):
    spec, tensors = read(path)
    spec["attributes"][module] = said
    with pytest.raises(FileError, match=message):
        load(build(), written(tmp_path / "changed.safetensors", spec, tensors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("f.0.weight", (9, 1, 3, 3)), ("f.0.weight", (0, 1, 3, 3)), ("f.0.weight", (3, 1, 1, 3)),
        ("f.0.bias", (1,)), ("f.1.running_mean", (1,)), ("f.1.weight", (2,)), ("f.3.weight", (5, 1, 3, 3)),
        ("net.linear.bias", (9,)), ("f.0.weight", (8,)), ("f.1.num_batches_tracked", (1,)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_go_together(path, tmp_path, name, shape):
    spec, tensors = read(path)
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    spec["shapes"][name] = list(shape)
    with pytest.raises(FileError, match="contradicts itself: .*" + name.rpartition(".")[0]):
        load(build(), written(tmp_path / "changed.safetensors", spec, tensors))


def test_weights_that_were_changed_are_refused(path, tmp_path):
    spec, tensors = read(path)
    tensors["f.0.weight"][0, 0, 0, 0] += 1e-3
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, metadata={storage.KEY: json.dumps(spec)})
    with pytest.raises(FileError, match="has changed since it was saved: its SHA-256"):
        load(build(), changed)
    tensors["f.0.weight"] = tensors["f.0.weight"].long()
    with pytest.raises(FileError, match=r"has torch.int64 as 'f.0.weight', which is torch.float32"):
        load(build(), written(changed, spec, tensors))


# ---------------------------------------------------------------------------------------------------------------------
# Fuzz

VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 40_000, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e308, float("nan")),
    *(float("inf"), "", "a", "x" * 10_000, [], [[]], {}, {"a": 1}, [40_000, 40_000], [1e9], ["groups"], [None] * 1000),
    *({"eps": 1e9}, {"padding": [40_000] * 6}, {"groups": 10**30}, {"weight": [2**40]}, {"forward": "x"}),
)
KEYS = ("groups", "padding", "eps", "stride", "forward", "_modules", "version", "sha256", "f.0.weight", "__metadata__")


def places(value, way=()):
    """Every place in nested dicts and lists."""
    yield way
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*way, key))


def changed(value, random):
    """A copy with one to three places changed, removed or added to."""
    value = copy.deepcopy(value)
    for _ in range(random.integers(1, 4)):
        ways = [way for way in places(value) if way]
        *way, key = ways[random.integers(len(ways))]
        inner = value
        for step in way:
            inner = inner[step]
        new = VALUES[random.integers(len(VALUES))]
        match random.integers(4):
            case 0:
                del inner[key]
            case 1 if isinstance(inner, dict):
                inner[KEYS[random.integers(len(KEYS))]] = new
            case 2 if type(inner[key]) is int:
                inner[key] += int(random.integers(-3, 4))
            case _:
                inner[key] = new
        if not isinstance(value, dict) or not value:
            break
    return value


def assembled(header, data):
    return struct.pack("<Q", len(header)) + header + data


def mutated(whole, path, random):
    """(what was done, the bytes of a changed file)"""
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8 : 8 + length], whole[8 + length :]
    spec, tensors = read(path)

    def with_spec(text):
        head = json.loads(header)
        head["__metadata__"][storage.KEY] = text
        return assembled(json.dumps(head).encode(), data)

    kind = random.choice(
        [
            "bits",
            "head bits",
            "bytes",
            "cut",
            "longer",
            "header",
            "spec",
            "spec, hash",
            "shapes",
            "text",
            "length",
            "swap",
        ]
    )
    if kind in ("bits", "head bits"):
        content = bytearray(whole)
        for _ in range(random.integers(1, 9)):
            content[random.integers(len(content) if kind == "bits" else 8 + length)] ^= 1 << random.integers(8)
        return kind, bytes(content)
    if kind == "bytes":
        content, start = bytearray(whole), random.integers(len(whole))
        content[start : start + 64] = random.bytes(64)
        return kind, bytes(content)
    if kind == "cut":
        return kind, whole[: random.integers(len(whole))]
    if kind == "longer":
        return kind, whole + random.bytes(random.integers(1, 100))
    if kind == "header":
        return kind, assembled(json.dumps(changed(json.loads(header), random)).encode(), data)
    if kind == "spec":
        return kind, with_spec(json.dumps(changed(spec, random)))
    if kind == "spec, hash":
        spec = changed({key: value for key, value in spec.items() if key != "sha256"}, random)
        try:
            spec["sha256"] = storage._digest(spec, tensors)
        except (TypeError, ValueError):
            pass
        return kind, with_spec(json.dumps(spec))
    if kind == "shapes":
        for name in random.choice(list(tensors), size=random.integers(1, 4)):
            shape = [max(0, size + int(random.integers(-2, 3))) for size in tensors[name].shape]
            tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
            spec["shapes"][name] = shape
        out = path.with_name("shapes.safetensors")
        return kind, written(out, spec, tensors).read_bytes()
    if kind == "text":
        text, depth = json.dumps(spec), int(random.choice([10, 1_000, 100_000]))
        texts = (
            "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth, text + text, text[:-1],
            text.replace('"version": 2', '"version": 2, "version": 2'), text.replace('"version": 2', '"version": 2.0'),
            text.replace('"version": 2', '"version": NaN'), text.replace("[", "[" + "9" * 5_000 + ",", 1),
            text.replace("[", "[1e999,", 1), text.replace('"attributes": {', '"attributes": {"f.3": {"groups": 1}, '),
            "9" * 100_000, "null", '"' + "\\u0000" * 1_000 + '"', "\ufeff" + text,
        )  # fmt: skip
        return kind, with_spec(texts[random.integers(len(texts))])
    if kind == "length":
        claimed = int(random.choice([0, 1, length - 1, length + 1, len(whole), 2**31, 2**40, 2**62]))
        return kind, struct.pack("<Q", claimed) + whole[8:]
    head = json.loads(header)
    first, second = random.choice([name for name in head if name != "__metadata__"], size=2)
    head[first], head[second] = head[second], head[first]
    return kind, assembled(json.dumps(head).encode(), data)


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak():
    """Most memory that the process had since reset_peak, in MB."""
    with open("/proc/self/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith("VmHWM"))) / 1024


def fuzz(path, tmp_path, count, seed):
    random, whole, expected = np.random.default_rng(seed), path.read_bytes(), load(build(), path).state_dict()
    file, found = tmp_path / "mutated.safetensors", {}
    measured = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
    dense = build()
    for _ in range(count):
        kind, content = mutated(whole, path, random)
        file.write_bytes(content)
        if measured:
            reset_peak()
            before = peak()
        try:
            model = load(dense, file)
        except FileError as error:
            outcome, said = "refused", str(error)
        else:
            outcome, said = "equal", ""
            assert_of_the_architecture(model)
            if kind != "shapes":  # with zeros in the place of weights, and the right hash: another network's file
                torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
        assert len(said) < 20_000
        if measured:
            assert peak() - before < MEGABYTES
        found[kind, outcome] = found.get((kind, outcome), 0) + 1
    return found


@pytest.mark.medium
def test_fuzzed_files(path, tmp_path):
    found = fuzz(path, tmp_path, 120, seed=0)
    assert sum(count for (_, outcome), count in found.items() if outcome == "refused") > 90
    assert len({kind for kind, _ in found}) == 12


@pytest.mark.slow
def test_a_thousand_fuzzed_files(path, tmp_path):
    found = fuzz(path, tmp_path, 1000, seed=1)
    assert sum(count for (_, outcome), count in found.items() if outcome == "refused") > 800


def test_a_header_beyond_all_measure_is_not_parsed(path, tmp_path):
    """A file of a stranger with 30 MB of JSON; safetensors itself would take it."""
    spec, tensors = read(path)
    spec["model"] = "x" * 30_000_000
    large = written(tmp_path / "large.safetensors", spec, tensors)
    with pytest.raises(FileError, match="bytes before its weights"):
        load(build(), large)
