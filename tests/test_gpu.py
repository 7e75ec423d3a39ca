"""On a GPU, with its kernels, precisions and graphs, holds what the other tests show on the CPU."""

import copy
import os

import pytest
import torch
import torchvision
from torch import nn

import tcp_core as tcp
from tcp_core import nets
from tcp_core.datasets import sources
from tcp_core.study import comparators

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms want, before the first call


@pytest.fixture
def exact():
    """Kernels that give the same each time, in float32 proper."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def images():
    train, val, _ = sources.digits()
    return train, val


def build(seed=0):
    torch.manual_seed(seed)
    return nets.small_resnet(widths=(8, 16, 24), blocks=1, num_classes=10, in_channels=1)


def train(images, **options):
    how = {"epochs": 4, "batch_size": 64, "lr": 0.05, "device": GPU}
    if "prune" not in options:
        how |= {"budget": {"macs": 0.5}, "phase": (0.1, 0.5)}
    return tcp.fit(build(), *images, **how | options)


def same_on_the_cpu(model, x):
    """Whether the network computes there what it computes here."""
    here = model.eval()(x.to(GPU)).float().cpu()
    torch.testing.assert_close(copy.deepcopy(model).cpu()(x), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_ends_in_a_network_within_its_budget(images, precision, exact):
    result = train(images, precision=precision)
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    assert 0.97 <= result.report["utilisation"]["macs"] <= 1
    assert result.report["largest_gate_removed"] == 0
    assert result.history["train_loss"].is_monotonic_decreasing
    same_on_the_cpu(result.model, images[1].pixels[:64].float())
    counted = tcp.trace(result.model, images[1].pixels[:2].float().to(GPU)).cost()
    assert counted["macs"] == result.report["current"]["macs"]


def test_a_run_has_the_losses_that_it_has_on_the_cpu(images, exact):
    here, there = train(images), train(images, device="cpu")
    assert here.history["train_loss"].tolist() == pytest.approx(there.history["train_loss"].tolist(), rel=0.05)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(images, exact, tmp_path):
    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    whole = train(images)
    with pytest.raises(KeyboardInterrupt):
        train(images, checkpoints=tmp_path, checkpoint_every=5, on_epoch=stop)
    resumed = train(images, checkpoints=tmp_path, checkpoint_every=5)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.history["train_loss"].tolist() == resumed.history["train_loss"].tolist()


@pytest.mark.parametrize("method", comparators.METHODS)
def test_every_comparator_runs(images, method, exact):
    at = 0.0 if method == "small" else 0.3
    prune = comparators.pruner(method, {"macs": 0.5}, train=images[0], batch_size=64, augment="none", at=at)
    result = train(images, prune=prune)
    assert result.report["utilisation"]["macs"] <= 1
    same_on_the_cpu(result.model, images[1].pixels[:64].float())


def loop(images, called=lambda tailor: tailor, move_late=False, scale=False, steps=60):
    """A loop of a user's own; returns the losses and the Tailor."""
    model, losses = build(), []
    x, y = images[0].pixels[:512].float() / 16, images[0].labels[:512]
    if not move_late:
        model, x, y = model.to(GPU), x.to(GPU), y.to(GPU)
    tailor = tcp.Tailor(model, x[:2], budget={"macs": 0.5}, steps=steps, phase=(0.1, 0.6))
    tailor, x, y = tailor.to(GPU), x.to(GPU), y.to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=scale)
    call = called(tailor)
    for _ in range(steps):
        with torch.autocast("cuda", torch.float16, enabled=scale):
            loss = nn.functional.cross_entropy(call(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        tailor.step()
        losses.append(loss.item())
    assert tailor.finish() is model
    assert 0.97 <= tailor.report()["utilisation"]["macs"] <= 1
    same_on_the_cpu(model, x[:64].cpu())
    return losses, tailor


def test_loops_with_scaled_losses_and_networks_moved_late(images, exact):
    losses, tailor = loop(images)
    late, other = loop(images, move_late=True)
    assert late == losses
    assert torch.equal(tailor.open_units, other.open_units)
    scaled, _ = loop(images, scale=True)
    assert sum(scaled) == pytest.approx(sum(losses), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_loop_follows_the_gates(images, mode):
    """A graph that was recorded with the gates of one step must not be replayed with those values."""
    torch._dynamo.reset()
    losses, tailor = loop(images)
    compiled, other = loop(images, lambda tailor: torch.compile(tailor, mode=mode))
    assert sum(compiled) == pytest.approx(sum(losses), rel=0.1)
    kept = (tailor.open_units == other.open_units).float().mean()
    assert kept > 0.8


def test_a_budget_in_milliseconds_of_the_gpu(tmp_path):
    torch.manual_seed(0)
    widths = (256, 256, 512)
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)).to(GPU)
    x, y = torch.randn(64, 3, 56, 56, device=GPU), torch.randint(10, (64,), device=GPU)
    place = tcp.Latency("torch", device="cuda", batch=64, table=tmp_path / "table.json")
    tailor = tcp.Tailor(model, x[:2], budget={"latency": 0.5}, latency=place, steps=40, phase=(0.1, 0.6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(40):
        nn.functional.cross_entropy(tailor(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        tailor.step()
    report = tailor.report()
    assert tailor.finish() is model
    assert 0.9 <= report["utilisation"]["latency"] <= 1.02
    assert torch.cuda.get_device_name() in (tmp_path / "table.json").read_text()


def test_what_is_saved_exported_and_measured(images, exact, tmp_path):
    result = train(images)
    x = images[1].pixels[:64].float()
    tcp.save(result.model, tmp_path / "small.safetensors")
    loaded = tcp.load(build().to(GPU), tmp_path / "small.safetensors")
    assert torch.equal(loaded.eval()(x.to(GPU)), result.model.eval()(x.to(GPU)))
    pytest.importorskip("onnxruntime")
    tcp.export(result.model, tmp_path / "small.onnx", x[:2].to(GPU))
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    evaluated = tcp.evaluate(result.model, images[1])["accuracy"]
    assert evaluated == pytest.approx(tcp.evaluate(copy.deepcopy(result.model).cpu(), images[1])["accuracy"], abs=0.01)


def test_a_ladder_and_a_budget_of_memory(images, exact):
    how = {"epochs": [4, 3], "batch_size": 64, "lr": 0.05, "phase": (0.1, 0.5), "device": GPU}
    curve = tcp.ladder(build(), *images, budgets=[{"macs": 0.6}, {"macs": 0.3}], **how)
    assert (curve.table["macs_share"] <= [0.6, 0.3]).all()
    memory = train(images, budget={"memory": 0.6})
    assert 0.8 <= memory.report["utilisation"]["memory"] <= 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "vit_b_16"])
def test_networks_are_traced_and_made_smaller_there(name, exact):
    torch.manual_seed(0)
    size = 224 if name == "vit_b_16" else 64
    model = torchvision.models.get_model(name, num_classes=10).to(GPU).eval()
    x = torch.randn(2, 3, size, size, device=GPU)
    channels = tcp.trace(model, x)
    open_units = torch.ones(channels.units, dtype=torch.bool)
    open_units[::3] = False
    open_units |= channels.frozen
    for family in channels.families:
        open_units[family.units[0]] = True
    closed = tcp.close(copy.deepcopy(model), channels, open_units)(x)
    smaller = tcp.remove(model, channels, open_units)
    torch.testing.assert_close(smaller(x), closed, rtol=1e-3, atol=1e-4)
