import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tcp_core import data, nets

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


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
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


def test_every_network_has_counts():
    assert set(nets.NETWORKS) == {*COUNTS, "small_resnet"}


def test_mobilenet_has_the_parameters_of_torchvisions():
    ours = nets.build("mobilenet_v2", num_classes=10).parameters()
    theirs = torchvision.models.mobilenet_v2(num_classes=10).parameters()
    assert [tuple(p.shape) for p in ours] == [tuple(p.shape) for p in theirs]


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


def test_small_resnet_learns_digits_in_seconds():
    train, val, _ = data.digits()
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
    with pytest.raises(ValueError, match=r"'resnet21'; known are .*mobilenet_v2.*resnet20"):
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
