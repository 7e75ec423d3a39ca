"""Rows that values pick, as in a mixture of experts, and what else stands between a weight and its layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_operators import check
from torch import nn

import tcp_core as tcp
from tcp_core import tracing
from tcp_core.tracing import movement


class Experts(nn.Module):
    """A mixture of experts, each of which computes on the rows that are its own."""

    def __init__(self, how, experts=3):
        super().__init__()
        self.how = how
        self.first, self.router = nn.Linear(6, 8), nn.Linear(8, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(experts)
        )
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.how == "mask":
                mask = chosen == number
                out[mask] = out[mask] + expert(x[mask])
            elif self.how == "search":
                rows = torch.where(chosen == number)[0]
                out = out.index_add(0, rows, expert(x[rows]))
            else:
                out = out + expert(x) * (chosen == number)[:, None]
        return self.last(x + out)


@pytest.mark.parametrize("how", ["mask", "search"])
def test_macs_that_depend_on_values_are_warned_of_and_no_expert_without_a_row_fails(how):
    torch.manual_seed(0)
    model, x = Experts(how), torch.randn(5, 6)
    with pytest.warns(UserWarning, match=r"how many rows 'experts\.0\.0', 'experts\.0\.2'.* and others compute on"):
        channels = tcp.trace(model, x)
    assert channels.prunable.sum() == 3 * 12
    assert channels.cost()["macs"] == 6 * 8 + 8 * 3 + 3 * 2 * 8 * 12 + 8 * 2  # a row for each expert
    open_units = ~channels.prunable
    open_units[channels.prunable.nonzero()[::2]] = True
    small = tcp.remove(model, channels, open_units)
    assert small.experts[1][0].out_features == 6
    closed = copy.deepcopy(model)
    for expert in closed.experts:
        expert[2].weight.data[:, 1::2] = 0
    assert torch.allclose(small.eval()(x), closed.eval()(x), atol=1e-6)


def test_experts_that_compute_on_every_row_are_not_warned_of():
    assert tcp.trace(Experts("product"), torch.randn(5, 6)).prunable.sum() == 3 * 12


class Looking(nn.Module):
    """Rows are picked by a buffer, and by values but summed before a layer takes them: macs are always the same."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):  # [batch, 4, 6]
        x = F.relu(self.first(x[:, self.mask]))
        rows = x.flatten(0, 1)
        return self.third(F.relu(self.second(x.mean(1)))) + rows[rows[:, 0] > 0].sum(0).mean()


def test_rows_of_a_buffer_and_rows_that_are_summed_are_not_warned_of():
    tcp.trace(Looking(), torch.randn(5, 4, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Weights and biases seen in more than one way


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_the_layer_behind_a_recurrent_one_is_free_whichever_way_its_bias_is_added(kind):
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.hidden, self.head = kind(8, 12, batch_first=True), nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(F.relu(self.hidden(self.layer(x)[0])))

    model, x = Behind(), torch.randn(4, 5, 8)
    assert tcp.trace(model, x).prunable.sum() == 16
    check(model, x)


def test_a_decoder_that_takes_the_transposed_weights_of_its_encoder():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.deeper = nn.Linear(20, 16), nn.Linear(16, 12)

        def forward(self, x):
            x = torch.tanh(self.deeper(torch.tanh(self.encode(x))))
            return F.linear(torch.tanh(F.linear(x, self.deeper.weight.t())), self.encode.weight.t())

    model, x = Tied(), torch.randn(4, 20)
    assert tcp.trace(model, x).prunable.sum() == 16 + 12
    check(model, x)


def test_widths_of_two_weights_in_one_module_have_names_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(10, 12))
            self.head = nn.Linear(10, 3)

        def forward(self, x):
            return self.head(F.relu(F.linear(F.relu(F.linear(x, self.first)), self.second)))

    channels = tcp.trace(nn.Sequential(Two()), torch.randn(4, 8))
    assert channels.widths() == {"0.first": 12, "0.second": 10, "0.head": 3}


# ---------------------------------------------------------------------------------------------------------------------
# What a Tailor is given and leaves


def small():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_trace_of_another_size_is_refused():
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    channels = tcp.trace(convolution, torch.randn(2, 3, 8, 8))
    how = {"budget": {"macs": 0.5}, "steps": 100, "channels": channels}
    for other in (torch.randn(2, 3, 32, 32), "no tensor"):
        with pytest.raises(
            ValueError, match=r"came with channels=, a trace of \[\(3, 8, 8\)\], so costs would be those"
        ):
            tcp.Tailor(convolution, other, **how)
    tcp.Tailor(convolution, torch.randn(7, 3, 8, 8), **how)
    tcp.Tailor(convolution, None, **how)


def test_weights_that_no_optimiser_trains_are_told_of_as_soon_as_they_change():
    model, x = small(), torch.randn(8, 6)
    tailor = tcp.Tailor(model, x, budget={"macs": 0.5}, steps=100)
    for _ in range(3):
        tailor(x).square().mean().backward()
        tailor.step()  # one may still be made
    tailor(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    with pytest.raises(RuntimeError, match="no optimiser is known that trains '0.weight' and 3 more"):
        tailor.step()


def test_a_copy_of_a_tailor_begins_to_look_for_optimisers_anew():
    tailor, x = tcp.Tailor(small(), torch.randn(8, 6), budget={"macs": 0.5}, steps=100), torch.randn(8, 6)
    tailor(x).square().mean().backward()
    tailor.step()
    other = copy.deepcopy(tailor)
    other(x).square().mean().backward()
    other.step()  # one may still be made for it


@pytest.mark.medium
def test_a_network_is_plain_in_the_end_whoever_still_holds_a_former_tailor(tmp_path, recwarn):
    model, x = small(), torch.randn(8, 6)
    former = tcp.Tailor(model, x, budget={"macs": 0.7}, steps=100)
    tailor = tcp.Tailor(model, x, budget={"macs": 0.5}, steps=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(100):
        tailor(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tailor.step()
    assert [type(module) for module in tailor.finish()] == [nn.Linear, nn.ReLU, nn.Linear]
    tcp.save(model, tmp_path / "small.safetensors")
    assert not [warning for warning in recwarn if "still being tailored" in str(warning.message)]
    del former
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


# ---------------------------------------------------------------------------------------------------------------------
# Whose fault it is


def test_an_error_of_the_trace_is_not_called_one_of_the_model(monkeypatch):
    monkeypatch.setitem(tracing.RULES, "relu", movement.view)  # which looks for a shape among the arguments
    with pytest.raises(RuntimeError, match=r"the trace itself failed, with IndexError in view: .* please report it"):
        tcp.trace(small(), torch.randn(4, 6))


def test_an_error_of_the_model_is_not_called_one_of_the_trace():
    class Broken(nn.Module):
        def forward(self, x):
            return F.linear(x, torch.zeros(3, 5))

    for model in (nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 2)), nn.Sequential(nn.Linear(6, 4), Broken())):
        with pytest.raises(ValueError, match=r"the model raised RuntimeError in train mode on the example"):
            tcp.trace(model, torch.randn(4, 6))
