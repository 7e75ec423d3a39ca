import importlib.util
import pickle
import urllib.request

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tcp_core import nets, trace
from tcp_core.datasets import sources
from tcp_core.study import comparators

# name: parameters, macs, and both as papers print them, in millions
COUNTS = {
    "resnet20": (269_722, 40_551_040, 0.27, 40.6),  # He et al. 2016; Li et al. 2017
    "resnet32": (464_154, 68_862_592, 0.46, 69),
    "resnet44": (658_586, 97_174_144, 0.66, 97),
    "resnet56": (853_018, 125_485_696, 0.85, 125.5),
    "resnet110": (1_727_962, 252_887_680, 1.73, 252.9),
    "vgg16_bn": (14_987_210, 313_463_808, 14.98, 313.5),  # Lin et al. 2020 print 14.98
    "mobilenet_v2": (2_236_682, 87_976_448, 2.24, 88.0),
    "densenet40_12": (1_059_298, 282_917_328, 1.06, 282.92),
    "googlenet": (6_158_346, 1_521_756_160, 6.15, 1520),
}
# for 1,000 classes and 224 x 224 images; macs in G. Torchvision's documentation prints the same
IMAGENET_COUNTS = {
    "imagenet_resnet18": (11_689_512, 1_814_073_344, 11.69, 1.814),
    "imagenet_resnet34": (21_797_672, 3_663_761_408, 21.80, 3.664),
    "imagenet_resnet50": (25_557_032, 4_089_184_256, 25.56, 4.089),
    "imagenet_mobilenet_v2": (3_504_872, 300_774_272, 3.50, 0.3008),
}
LARGE = (*IMAGENET_COUNTS, "resnet18_small_stem")


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_that_papers_print(name):
    model = nets.build(name, num_classes=10)
    counted_parameters, counted_macs, printed_parameters, printed_macs = COUNTS[name]
    assert parameters(model) == counted_parameters
    assert macs(model, 3, 32, 32) == counted_macs
    # half a unit of the last digit that is printed, or a whole one where papers cut it off
    assert counted_parameters / 1e6 == pytest.approx(printed_parameters, abs=0.01)
    assert counted_macs / 1e6 == pytest.approx(printed_macs, rel=2.5e-3)


@pytest.mark.parametrize("name", IMAGENET_COUNTS)
def test_counts_of_imagenet_networks_are_those_that_papers_print(name):
    with torch.device("meta"):
        model = nets.build(name, num_classes=1000)
    counted_parameters, counted_macs, printed_parameters, printed_macs = IMAGENET_COUNTS[name]
    assert parameters(model) == counted_parameters
    assert macs(model, 3, 224, 224) == counted_macs
    assert counted_parameters / 1e6 == pytest.approx(printed_parameters, abs=0.005)
    assert counted_macs / 1e9 == pytest.approx(printed_macs, abs=0.0005)


def test_small_stem_gives_the_first_stage_16_x_16_maps():
    model = nets.build("resnet18_small_stem", num_classes=100)
    sizes = []
    model.layer1.register_forward_hook(lambda module, given, out: sizes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 64, 64))
    assert sizes == [(2, 64, 16, 16)]
    assert parameters(model) == 11_689_512 - 900 * 513 - 64 * 3 * (7 * 7 - 3 * 3)


def test_every_network_has_counts():
    assert set(nets.NETWORKS) == {*COUNTS, *LARGE, "small_resnet"}


@pytest.mark.parametrize("name", ["imagenet_resnet18", "imagenet_mobilenet_v2"])
def test_imagenet_networks_are_torchvisions(name):
    ours = nets.build(name, num_classes=10)
    theirs = torchvision.models.get_model(name.removeprefix("imagenet_"), num_classes=10)
    torch.manual_seed(3)
    with torch.no_grad():
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 64, 64)
        assert ours.eval()(x).equal(theirs.eval()(x))


@pytest.mark.medium
@pytest.mark.parametrize("name", ["imagenet_resnet50", "imagenet_mobilenet_v2", "resnet18_small_stem"])
def test_large_networks_are_rebuilt_with_fewer_channels(name):
    model, x = nets.build(name, num_classes=10), torch.randn(2, 3, 32, 32)
    channels = trace(model, x)
    assert channels.cost()["macs"] == macs(model, 3, 32, 32)
    assert not channels.unknown
    small = comparators.pruner("small", {"macs": 0.5})(model, channels, 100)
    assert 0.97 < small.report()["utilisation"]["macs"] <= 1
    assert small.model(x).shape == (2, 10)
    assert macs(small.model, 3, 32, 32) == small.report()["current"]["macs"]


def test_mobilenet_has_the_parameters_of_torchvisions():
    ours = nets.build("mobilenet_v2", num_classes=10).parameters()
    theirs = torchvision.models.mobilenet_v2(num_classes=10).parameters()
    assert [tuple(p.shape) for p in ours] == [tuple(p.shape) for p in theirs]


@pytest.mark.medium
@pytest.mark.parametrize("name", nets.NETWORKS)
def test_takes_other_images_and_classes_and_trains(name):
    model = nets.build(name, num_classes=7, in_channels=1)
    logits = model(torch.randn(2, 1, 16, 16))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in model.parameters()) > 0


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (56, 9)])
def test_resnet_names_are_those_of_the_published_weights(depth, blocks):
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    expected |= {f"bn1.{name}": (16,) for name in norm}
    inputs = 16
    for layer, width in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            for conv in (1, 2):
                at = f"layer{layer}.{block}"
                expected[f"{at}.conv{conv}.weight"] = (width, inputs, 3, 3)
                expected |= {f"{at}.bn{conv}.{name}": (width,) for name in norm}
                inputs = width
    state = nets.build(f"resnet{depth}", num_classes=10).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert {k: v for k, v in shapes.items() if "num_batches_tracked" not in k} == expected


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 8), (3, 8), (4, 4)])
def test_shortcut_subsamples_and_pads_channels_with_zeros(inputs, outputs):
    block = nets.BasicBlock(inputs, outputs, stride=2)
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, inputs, 7, 8)
    expected = torch.zeros(2, outputs, 4, 4)
    before = (outputs - inputs) // 2
    for row in range(4):
        for column in range(4):
            expected[:, before : before + inputs, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(block(x), expected)
    assert isinstance(block.shortcut, nn.ZeroPad3d)


@pytest.mark.parametrize("name", ["resnet56", "mobilenet_v2"])
def test_weights_start_as_he_et_al_2015_draw_them(name):
    for module in nets.build(name, num_classes=10).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            error = 6 / (2 * module.weight.numel()) ** 0.5  # six standard errors
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=error)
            assert module.bias is None or not module.bias.any()


@pytest.mark.medium
def test_small_resnet_learns_digits_in_seconds():
    train, val, _ = sources.digits()
    model = nets.small_resnet(widths=(8, 16, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        for x, y in train.batches(64, shuffle=True, epoch=epoch, drop_last=True):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    (x, y), *_ = val.batches(len(val))
    with torch.inference_mode():
        assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet21'.* one of .*mobilenet_v2.*resnet20"):
        nets.build("resnet21", num_classes=10)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth {depth}: it must be 6n \+ 2"):
        nets.resnet(depth)


@pytest.mark.parametrize(
    "wrong", [{"widths": (16, 32)}, {"widths": (32, 16, 64)}, {"widths": (0, 1, 2)}, {"blocks": 0}]
)
def test_impossible_widths_are_refused(wrong):
    with pytest.raises(ValueError, match="three positive numbers that do not decrease"):
        nets.small_resnet(**wrong)


# Weights


def written(folder, state, name="weights.pth"):
    path = folder / name
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


def states(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def equal(first, second):
    return list(first) == list(second) and all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("weights.safetensors", lambda state: state),
        ("weights.pth", lambda state: state),
        ("weights.pt", lambda state: {"epoch": 3, "state_dict": {f"module.{key}": state[key] for key in state}}),
        ("000000001.ckpt", lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_weights_come_back_from_a_file(tmp_path, name, packed, counted):
    torch.manual_seed(1)
    saved = states(nets.small_resnet())
    saved["bn1.running_mean"] += 1
    kept = {key: value for key, value in saved.items() if counted or "num_batches_tracked" not in key}
    model = nets.small_resnet()
    nets.load_weights(model, written(tmp_path, packed(kept), name))
    assert equal(model.state_dict(), saved)


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: states(nets.small_resnet(num_classes=7)), "with 7 classes, and this one has 10"),
        (
            lambda state: states(nets.small_resnet(in_channels=3)),
            r"1 of 44 tensors differ, .*'conv1.weight': \(16, 3, 3, 3\)",
        ),
        (
            lambda state: states(nets.small_resnet(blocks=2)),
            r"of this ResNet. 36 of 80 tensors .* 'layer1.1.conv1.weight': \(16, .*\) there, absent here",
        ),
        (
            lambda state: states(nets.build("vgg16_bn", num_classes=10)),
            r"'conv1.weight': absent there, \(16, 1, 3, 3\)",
        ),
        (lambda state: without(state, "bn1.running_var"), "1 of 44 tensors differ, .*'bn1.running_var': absent"),
        (lambda state: without(state, "linear.bias"), "1 of 44 tensors differ, .*'linear.bias': absent"),
    ],
)
def test_weights_of_something_else_are_refused_and_change_nothing(tmp_path, change, message):
    model = nets.small_resnet()
    before = states(model)
    with pytest.raises(ValueError, match=message):
        nets.load_weights(model, written(tmp_path, change(states(model))))
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("content", [torch.zeros(2), {}, {"epoch": 3}, {1: torch.zeros(2)}, nn.Linear(2, 2)], ids=repr)
def test_files_of_other_values_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"cannot be read as weights \(\w+\); .* a state dict alone"):
        nets.load_weights(nets.small_resnet(), written(tmp_path, content))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", pickle.dumps(print), None])
def test_files_that_hold_no_weights_are_refused(tmp_path, name, content):
    path = written(tmp_path, states(nets.small_resnet()), name)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as weights \(\w+\); it must be a whole"):
        nets.load_weights(nets.small_resnet(), path)


def test_absent_weights_are_refused(tmp_path):
    for place in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(FileNotFoundError, match=rf"there is no weights file {place}; give the path"):
            nets.load_weights(nets.small_resnet(), place)


def test_published_weights_are_torchvisions(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *given, **options: 1 / 0)
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    model = nets.build("imagenet_resnet18", num_classes=1000)
    saved = states(model)
    place = written(tmp_path / "checkpoints", saved, url.rpartition("/")[2])  # as if fetched before
    nn.init.zeros_(model.fc.weight)
    nets.load_weights(model, "published", name="imagenet_resnet18")
    assert equal(model.state_dict(), saved)
    with pytest.raises(ValueError, match="published weights of imagenet_resnet18: .* 1000 classes, and .* has 7"):
        nets.load_weights(nets.build("imagenet_resnet18", num_classes=7), "published", name="imagenet_resnet18")
    place.unlink()
    with pytest.raises(FileNotFoundError, match=rf"cannot be fetched \(.*\); fetch {url} where .* give the path"):
        nets.load_weights(model, "published", name="imagenet_resnet18")


@pytest.mark.parametrize("name", ["", "resnet20", "resnet18", "resnet18_small_stem"])
def test_weights_that_nobody_published_are_refused(name):
    with pytest.raises(ValueError, match=f"no published weights of '{name}', only of imagenet_mobilenet_v2, .*path"):
        nets.load_weights(nets.small_resnet(), "published", name=name)


# ---------------------------------------------------------------------------------------------------------------------
# Networks of others


def own_network(*, num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, num_classes))


def no_network(*, num_classes, in_channels):
    return "a network"


def without_channels(num_classes):
    return nn.Linear(1, num_classes)


@pytest.mark.parametrize(
    ("name", "size"), [("timm:resnet10t", 32), ("torchvision:squeezenet1_1", 32), (f"{__name__}:own_network", 8)]
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_networks_of_others_are_built_by_name(name, size, in_channels):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = nets.build(name, num_classes=7, in_channels=in_channels)
    x = torch.randn(2, in_channels, size, size)
    assert model.eval()(x).shape == (2, 7)
    assert trace(model, x).prunable.any()


def test_auxiliary_heads_are_left_out():
    model = nets.build("torchvision:googlenet", num_classes=5)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet_20", ValueError, r"unknown network 'resnet_20' \(did you mean resnet20\?\); .*or \"timm:NAME\""),
        ("torchvision:resnet19", ValueError, r"no classifier 'resnet19' \(did you mean resnet1"),
        ("timm:", ValueError, r"'timm:' is no network's name; it must be \"timm:NAME\""),
        ("no_such_package.nets:f", ImportError, r"names the module no_such_package.nets, and there is no no_such_pack"),
        (f"{__name__}:own_netwrk", ValueError, r"has no function 'own_netwrk' \(did you mean own_network"),
        (f"{__name__}:no_network", TypeError, r"returned str; it must return a torch\.nn\.Module"),
        (f"{__name__}:without_channels", ValueError, r"is called with num_classes=\.\.\. and in_channels=.*does not"),
    ],
)
def test_names_of_no_network(name, error, message):
    with pytest.raises(error, match=message):
        nets.build(name, num_classes=7)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'timm:resnet18' needs the package timm.*pip install timm"):
        nets.build("timm:resnet18", num_classes=7)


def test_timm_names_are_checked():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm has no network 'resnet10'.*did you mean"):
        nets.build("timm:resnet10", num_classes=7)
