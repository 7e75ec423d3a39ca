"""Steps that would spoil the network are refused: weights, statistics and optimiser state stay as they were."""

import copy
import math

import pytest
import torch
from torch import nn

from tcp_core import fit, nets
from tcp_core.datasets import sources
from tcp_core.training.guard import Guard

EPOCHS, BATCH = 6, 20


class Spoiled(torch.autograd.Function):
    """Passes values on as they are, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, ctx.value), None


class Net(nn.Module):
    """Keeps a mean that its forward pass puts another tensor in the place of, and spoils one step's gradients."""

    def __init__(self, at=None, value=math.nan):
        super().__init__()
        torch.manual_seed(0)
        self.net = nets.small_resnet(widths=(4, 8, 12), blocks=1, num_classes=10, in_channels=1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("late", None)
        self.at, self.value, self.taken, self.before = at, value, 0, None

    def forward(self, x):
        training = self.training and torch.is_grad_enabled()
        if training and torch.is_grad_enabled():
            self.taken += 1
            if self.taken == self.at:
                self.before = copy.deepcopy(self.net.state_dict()), self.mean
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        y = self.net(x)
        return Spoiled.apply(y, self.value) if training and self.taken == self.at else y


@pytest.fixture(scope="module")
def images():
    train, _, _ = sources.digits()
    return train.split(len(train) - 320)[0]


@pytest.mark.parametrize("budget", [None, {"macs": 0.5}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_refused_with_a_finite_loss(images, budget, value):
    model = Net(at=9, value=value)
    said = r"loss is \d.*but the gradient of 'net\..*' and \d+ more is not finite at step \d+; .* was not taken\. Lower"
    with pytest.raises(FloatingPointError, match=said):
        fit(model, images, budget=budget, epochs=EPOCHS, batch_size=BATCH, augment="none")
    before, mean = model.before
    if budget is None:  # with one, the parameters were multiplied by their gates when they were looked at
        torch.testing.assert_close(model.net.state_dict(), before, rtol=0, atol=0)
    assert model.mean is mean
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    assert all(p.grad is None for p in model.parameters())


def test_statistics_that_were_put_in_the_place_of_others_come_back():
    model = nn.Module()
    model.register_buffer("replaced", torch.ones(2))
    model.register_buffer("filled", None)
    model.register_buffer("changed", torch.ones(2), persistent=False)
    model.register_buffer("grid", torch.arange(6.0).view(2, 3).T)  # not contiguous
    model.register_buffer("count", torch.tensor(3))
    replaced, changed = model.replaced, model.changed
    model.weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad = torch.ones(2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for loss, gradient, said in (
        (math.nan, 0.0, "the loss is nan at step 3"),
        (1.5, math.inf, "the loss is 1.5, but the gradient of 'weight' is not finite at step 3"),
    ):
        guard = Guard(model)
        model.replaced = model.replaced * math.nan
        model.filled = torch.ones(1)
        model.changed.fill_(math.nan)
        model.grid.zero_()
        model.count += 1
        model.register_buffer("late", torch.ones(1))
        model.weight.grad = torch.full((2,), gradient)
        with pytest.raises(FloatingPointError, match=said):
            guard.check(torch.tensor(loss), model, optimizer, 3)
        assert list(model._buffers) == ["replaced", "filled", "changed", "grid", "count"]
        assert model.grid.tolist() == [[0, 3], [1, 4], [2, 5]]
        assert model.count == 3
        assert model.replaced is replaced
        assert model.changed is changed
        assert model.filled is None
        assert changed.tolist() == replaced.tolist() == [1, 1]
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_large_gradients_are_no_fault():
    """Their squares are beyond float32, they themselves are not."""
    model = nn.Linear(4, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    Guard(model).check(torch.tensor(1.0), model, torch.optim.SGD(model.parameters(), lr=0.1), 1)


@pytest.mark.parametrize("position", [0, 17, 31])
def test_one_bad_number_is_seen_wherever_it_stands(position):
    model = nn.Linear(8, 4)
    model.weight.grad, model.bias.grad = torch.ones(4, 8), torch.ones(4)
    model.weight.grad.view(-1)[position] = math.nan
    with pytest.raises(FloatingPointError, match="gradient of 'weight' is not finite"):
        Guard(model).check(torch.tensor(1.0), model, torch.optim.SGD(model.parameters(), lr=0.1), 1)


def test_weights_that_an_earlier_step_spoiled_are_named():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(FloatingPointError, match=r"Already before it weights were not finite \('weight'\)"):
        Guard(model).check(torch.tensor(math.inf), model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
