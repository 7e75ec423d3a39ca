"""Files for other runtimes: what they compute is what the network computes, or there is no file."""

import copy
import importlib.util
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from random_nets import INPUT_SHAPE, networks
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import build, random_open

import tcp_core as tcp
from tcp_core import ExportError, Tailor, export, nets, remove, trace
from tcp_core.deploy import exporting

ROOT = Path(exporting.__file__).parents[2]
SEARCHED = settings(
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


def tailored(dense, x, share=0.5):
    channels = trace(dense, x)
    return remove(dense, channels, random_open(channels, share))


def small():
    return tailored(lively(nets.small_resnet(widths=(8, 12, 16))), torch.randn(2, 1, 8, 8))


def lively(model):
    """Give batch norms running statistics and affine parameters that are neither 0 nor 1."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
    return model


def run(path, *inputs):
    """What onnxruntime, or torch on the archive, makes of the file: a runtime started here, not the one of `export`."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return tree_leaves(torch.export.load(path).module()(*inputs))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, named)]


def assert_same(path, model, *inputs):
    with torch.no_grad():
        expected = tree_leaves(copy.deepcopy(model).eval()(*inputs))
    found = run(path, *inputs)
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4 * float(a.abs().max()))


def check(model, path, shape, batches=(1, 5)):
    """Export on one batch, and compare on others of other sizes."""
    assert export(model, path, torch.randn(2, *shape)) == path
    for batch in batches:
        assert_same(path, model, torch.randn(batch, *shape))


@pytest.mark.medium
def test_no_place_of_this_machine_is_written(tmp_path):
    path = export(small(), tmp_path / "small.onnx", torch.randn(1, 1, 8, 8))
    assert str(ROOT).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes()


@pytest.mark.medium
def test_no_place_of_this_machine_is_written_in_branches(tmp_path):
    class Condition(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x)
            return torch.cond(x.sum() > 0, lambda x: self.branch(x).sin(), lambda x: x.cos(), (x,))

    path = export(Condition(), tmp_path / "condition.onnx", torch.randn(2, 6))
    for what in (str(ROOT), Path(__file__).name, "torch.cond", "stack_trace"):
        assert what.encode() not in path.read_bytes()
    written = onnx.load(path)
    inner = [a.g for node in written.graph.node for a in node.attribute if node.op_type == "If"]
    shapes = [put.type.tensor_type.shape.dim for graph in inner for put in graph.output]
    assert [[dim.dim_param or dim.dim_value for dim in shape] for shape in shapes] == [["batch", 8], ["batch", 8]]


def operators(path):
    if path.suffix == ".onnx":
        return Counter(node.op_type for node in onnx.load(path).graph.node)
    return Counter(str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function")


def norms(path):
    return sum(count for name, count in operators(path).items() if "norm" in name.lower())


# -------------------------------------------------------------------------------------------------
# The file computes what the network computes


@pytest.mark.medium
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_tailored_network(suffix, tmp_path):
    model = small()
    path = tmp_path / f"small{suffix}"
    check(model, path, (1, 8, 8), batches=(1, 2, 7))
    assert norms(path) == 0
    assert list(tmp_path.iterdir()) == [path]  # nothing beside it


@pytest.mark.slow
def test_depthwise_convolutions_and_shortcuts(tmp_path):
    model = tailored(lively(nets.build("mobilenet_v2", num_classes=10)), torch.randn(2, 3, 16, 16))
    check(model, tmp_path / "network.onnx", (3, 16, 16))
    assert norms(tmp_path / "network.onnx") == 0


class Branches(nn.Module):
    """A layer that feeds two, one of them a batch norm; one after a concatenation; linear layers with batch norms."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.after = nn.BatchNorm2d(8)
        self.joined = nn.BatchNorm2d(16, affine=False)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2, bias=False)
        self.wide = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 7)
        self.flat = nn.BatchNorm1d(7)
        self.drop = nn.Dropout()

    def forward(self, x):
        x = self.stem(x)
        x = self.joined(torch.cat([self.after(x).relu(), x], 1))
        x = self.wide(self.up(x)).relu().mean((2, 3))
        return self.flat(self.drop(self.hidden(x)))


@pytest.mark.medium
def test_a_batch_norm_that_another_reads_beside_is_left(tmp_path):
    path = tmp_path / "branches.pt2"
    check(lively(Branches()), path, (3, 8, 8))
    assert norms(path) == 2  # the stem's convolution feeds two, the other norm follows a concatenation


@pytest.mark.medium
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_in_groups(groups, tmp_path):
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    check(lively(model), tmp_path / "up.pt2", (4, 6, 6))
    assert norms(tmp_path / "up.pt2") == (groups > 1)


@pytest.mark.medium
def test_a_convolution_used_twice_with_two_norms(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x):
            x = self.second(self.conv(self.first(self.conv(x)).relu()))
            return nn.functional.conv2d(x, self.conv.weight, self.bias, padding=1)

    check(lively(Twice()), tmp_path / "twice.pt2", (4, 6, 6))
    assert norms(tmp_path / "twice.pt2") == 0
    program = torch.export.load(tmp_path / "twice.pt2")
    assert sum(value.numel() for value in program.state_dict.values()) == 3 * (4 * 4 * 9 + 4)  # nothing is there idle


@pytest.mark.medium
def test_a_norm_over_tokens_and_one_without_statistics_stay(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(3)
            self.plain = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, track_running_stats=False))

        def forward(self, x):  # [batch, 3, 4]: the norm's channels are not the linear layer's
            return self.plain(self.norm(self.linear(x)))

    check(lively_but_plain(Odd()), tmp_path / "odd.pt2", (3, 4), batches=(2, 5))
    assert norms(tmp_path / "odd.pt2") == 2


def lively_but_plain(model):
    lively(model.norm)
    return model


@pytest.mark.medium
def test_several_inputs_and_outputs_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

        def forward(self, image, *, scale=None, counts=None):
            x = self.norm(self.conv(image)) * scale[:, :, None, None]
            return {"mean": x.mean((2, 3)), "all": [x, counts + 1]}

    example = {"image": torch.randn(3, 2, 6, 6), "scale": torch.randn(3, 1), "counts": torch.arange(3)}
    path = export(lively(Two()), tmp_path / "two.onnx", example)
    session = onnxruntime.InferenceSession(path)
    assert [node.name for node in session.get_inputs()] == ["image", "scale", "counts"]
    assert [node.name for node in session.get_outputs()] == ["output_0", "output_1", "output_2"]
    assert {node.shape[0] for node in (*session.get_inputs(), *session.get_outputs())} == {"batch"}


@pytest.mark.medium
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_inputs_that_are_handed_through(suffix, tmp_path):
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x, mask):
            return {"y": self.linear(x), "mask": mask, "again": [mask, mask.detach()], "none": None}

    model, inputs = Through(), (torch.randn(3, 6), torch.randn(3, 4))
    path = export(model, tmp_path / f"through{suffix}", inputs)
    expected = [model(*inputs)["y"], *[inputs[1]] * 3]
    found = [x for x in run(path, *inputs) if x is not None]
    torch.testing.assert_close(found, expected)
    if suffix == ".onnx":
        assert [node.name for node in onnx.load(path).graph.input] == ["x", "mask"]


@pytest.mark.parametrize(("other", "said"), [(4, "4"), (0.5, "0.5"), (None, "a size")])
def test_outputs_that_are_no_tensors(other, said, tmp_path):
    class Numbered(nn.Module):
        def forward(self, x):
            return {"y": x * 2, "other": x.shape[0] if other is None else other}

    assert export(Numbered(), tmp_path / "numbered.pt2", torch.randn(2, 6)).exists()
    with pytest.raises(ExportError, match=f"tensors alone, and among the outputs is {said}: .* export to .pt2"):
        export(Numbered(), tmp_path / "numbered.onnx", torch.randn(2, 6))


def test_the_batch_can_be_fixed(tmp_path):
    class Written(nn.Module):
        def forward(self, x):
            return x.reshape(2, 12).cumsum(1)

    x = torch.randn(2, 3, 4)
    with pytest.raises(ExportError, match="dynamic=False"):
        export(Written(), tmp_path / "fixed.pt2", x)
    assert_same(export(Written(), tmp_path / "fixed.pt2", x, dynamic=False), Written(), torch.randn(2, 3, 4))


@pytest.mark.medium
@given(network=networks())
@settings(SEARCHED, max_examples=3)
def test_random_networks(network, tmp_path):
    exported_or_refused(network, tmp_path / "random.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_many_random_networks(suffix, tmp_path):
    outcomes = Counter()

    @given(network=networks())
    @settings(SEARCHED, max_examples=60, phases=[Phase.generate])  # shrinking would take an hour
    def search(network):
        outcomes[exported_or_refused(network, tmp_path / f"random{suffix}")] += 1

    search()
    assert outcomes[True] > 2 * outcomes[False], outcomes


def exported_or_refused(network, path):
    """Say whether the network was exported; what is refused has a reason in torch, never an output that differs."""
    network, x = network.float(), torch.randn(INPUT_SHAPE)
    try:
        export(network, path, x, dynamic=False)
    except ExportError as error:
        if "would" in str(error):  # differ, give other shapes
            raise
        return False
    assert_same(path, network, torch.randn(INPUT_SHAPE))
    return True


ZOO = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "efficientnet_b0"]
ZOO += ["regnet_y_400mf", "googlenet", "squeezenet1_1", "vit_b_16"]
# Norms that no layer stands before: of 58 dense blocks, 3 transitions and the head after concatenations; over tokens.
LEFT = {"densenet121": 62, "vit_b_16": 25}


@pytest.mark.slow
@pytest.mark.parametrize("removed", [False, True], ids=["dense", "removed"])
@pytest.mark.parametrize("name", ZOO)
def test_networks_of_torchvision(name, removed, tmp_path):
    model = build(name)
    if removed:
        model = tailored(model, torch.randn(2, 3, 64, 64))
    for suffix in (".onnx", ".pt2"):
        path = tmp_path / f"network{suffix}"
        check(model, path, (3, 64, 64))
        assert norms(path) == LEFT.get(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet56", "vgg16_bn", "mobilenet_v2", "densenet40_12", "googlenet"])
def test_networks_of_papers(name, tmp_path):
    for model in (dense := lively(nets.build(name, num_classes=10)), tailored(dense, torch.randn(2, 3, 32, 32))):
        check(model, tmp_path / "network.onnx", (3, 32, 32))


# -------------------------------------------------------------------------------------------------
# What was there stays


@pytest.mark.medium
@pytest.mark.parametrize("train", [True, False])
def test_the_network_is_untouched(train, tmp_path):
    model = small().train(train)
    model.bn1.train(not train)  # on purpose
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    x = torch.randn(3, 1, 8, 8)
    random = torch.get_rng_state()
    export(model, tmp_path / "small.pt2", x)
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in model.modules()]
    assert tensors == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.medium
def test_wrapped_networks_are_unwrapped(tmp_path):
    model = small()
    compiled = torch.compile(model)
    assert_same(export(compiled, tmp_path / "a.pt2", torch.randn(1, 1, 8, 8)), model, torch.randn(3, 1, 8, 8))


@pytest.mark.medium
def test_the_example_may_be_half_or_double_as_traced(tmp_path):
    model = small()
    path = export(model, tmp_path / "a.pt2", torch.randn(1, 1, 8, 8, dtype=torch.float64))
    assert_same(path, model, torch.randn(2, 1, 8, 8))


# -------------------------------------------------------------------------------------------------
# Refusals: loud, and nothing half-written


@pytest.fixture
def older(tmp_path):
    path = tmp_path / "older.pt2"
    path.write_bytes(b"an older file")
    return path


def assert_left(path):
    assert path.read_bytes() == b"an older file"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.medium
def test_outputs_that_differ_are_refused(older, monkeypatch):
    def wrong(program):
        module, left = original(program)
        with torch.no_grad():
            module.conv1.weight.data *= 1.001
        return module, left

    original = exporting.folded
    monkeypatch.setattr(exporting, "folded", wrong)
    with pytest.raises(ExportError, match=r"output 0 of older\.pt2 would differ from torch's by .* on a batch of 1"):
        export(small(), older, torch.randn(1, 1, 8, 8))
    assert_left(older)


@pytest.mark.medium
def test_what_does_not_fit_all_batches_is_refused(older, monkeypatch):
    monkeypatch.setattr(exporting, "_write_archive", lambda program, path: lambda x: [torch.zeros(2, 10)])
    with pytest.raises(ExportError, match="would give outputs of shapes"):
        export(small(), older, torch.randn(1, 1, 8, 8))
    assert_left(older)


def test_random_outputs_are_refused(older):
    class Random(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, training=True)

    with pytest.raises(ExportError, match="other outputs when it is called again"):
        export(Random(), older, torch.randn(2, 30))
    assert_left(older)


def test_control_flow_on_values_is_refused(older):
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ExportError, match="Branching cannot be exported: torch.export raised"):
        export(Branching(), older, torch.randn(2, 3))
    assert_left(older)


@pytest.mark.medium
def test_what_onnx_has_no_word_for_is_refused(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"torch\.onnx cannot write this network"):
        export(Odd(), tmp_path / "odd.onnx", torch.randn(2, 3, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["small.pb", "small", "small.safetensors", "small.ONNX"])
def test_another_suffix_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"it must end in \.onnx .* or \.pt2"):
        export(small(), tmp_path / name, torch.randn(1, 1, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("example", [3, torch.tensor(1.0), torch.randn(0, 1, 8, 8), (), {"x": None}])
def test_no_example_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match="example must be a tensor with the batch in dimension 0"):
        export(small(), tmp_path / "small.pt2", example)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tolerance", [0, 1, -1, float("nan")])
def test_a_tolerance_is_a_share(tolerance, tmp_path):
    with pytest.raises(ValueError, match="tolerance"):
        export(small(), tmp_path / "small.pt2", torch.randn(1, 1, 8, 8), tolerance=tolerance)


def test_a_tailor_is_refused(tmp_path):
    x = torch.randn(2, 1, 8, 8)
    tailor = Tailor(nets.small_resnet(widths=(8, 12, 16)), x, budget={"macs": 0.5}, steps=100)
    with pytest.raises(ValueError, match=r"finish\(\)"):
        export(tailor, tmp_path / "small.pt2", x)


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_exported", None)  # not called
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        export(small(), tmp_path / "file" / "small.pt2", torch.randn(1, 1, 8, 8))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export(small(), tmp_path / "folder.pt2", torch.randn(1, 1, 8, 8))


def test_folders_are_made(tmp_path):
    path = export(nn.Linear(2, 3), str(tmp_path / "a" / "b" / "linear.pt2"), torch.randn(1, 2))
    assert path.exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ImportError, match=rf"need {package}, not installed here; .*pip install '\.\[deploy\]'"):
        export(nn.Linear(2, 3), tmp_path / "a.onnx", torch.randn(1, 2))
    assert not list(tmp_path.iterdir())


def test_the_readers_name_for_it():
    assert tcp.export is export
