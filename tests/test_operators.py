"""What operators do to channels and what they cost: recurrent layers, weights that are no parameters, norms without
weights, transposed convolutions in groups, operators over space, sums over channels.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import random_open

import tcp_core as tcp
from tcp_core import storage
from tcp_core.gates import close
from tcp_core.removal import remove


def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


class Recurrent(nn.Module):
    """A recurrent layer behind convolutions."""

    def __init__(self, kind, **options):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.layer = kind(8, 6, batch_first=True, **options)
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        return self.head(self.layer(self.conv(x).transpose(1, 2))[0].mean(1))


TWO = {"num_layers": 2, "bidirectional": True}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kind", "options"), [(nn.LSTM, {}), (nn.LSTM, TWO | {"proj_size": 3}), (nn.GRU, TWO), (nn.RNN, TWO)]
)
def test_recurrent_layers_are_counted_as_if_they_were_unrolled(kind, options):
    model, x = Recurrent(kind, **options), torch.randn(2, 3, 5)
    model(x)
    unrolled = copy.deepcopy(model).double()  # which torch has no single operator for
    with FlopCounterMode(display=False) as counter:
        unrolled.eval()(x[:1].double())
    channels = tcp.trace(model, x)
    assert channels.cost()["macs"] == counter.get_total_flops() // 2
    assert [row.layer for row in channels.explain().rows] == ["conv.0", "head"]
    assert channels.unknown == ((kind.__name__.lower() + "_tanh" * (kind is nn.RNN), "layer"),)


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(8, 24), nn.Linear(8, 3), fused

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def test_attention_is_counted_whether_or_not_it_is_fused():
    one, other = (tcp.trace(Attention(fused), torch.randn(2, 5, 8)).cost() for fused in (True, False))
    assert one == other
    assert one["macs"] == 5 * 8 * (24 + 3) + 2 * (2 * 5 * 5 * 4)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.both, self.norm = nn.Linear(4, 8), nn.Bilinear(8, 8, 3), nn.LayerNorm([2, 3])
        self.place = nn.Parameter(torch.randn(4, 6))  # met by operators that move data, or work element by element

    def forward(self, x):
        y = self.a(x)
        y = self.norm(self.both(y, y).unflatten(0, (-1, 1)).expand(-1, 2, -1))
        return torch.cat([self.place, y.flatten(1)]) * self.place[:1]


def test_operators_whose_products_are_not_counted_are_named():
    with pytest.warns(UserWarning, match="the macs of _trilinear in both are in no count"):
        tcp.trace(Bilinear(), torch.randn(2, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are no parameters


class Filtered(nn.Module):
    """A matrix that is a buffer, on the input or on channels."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.first = nn.Linear(8, 16), nn.Linear(8 if not first else 16, 3), first
        self.register_buffer("bank", torch.randn(8, 8) if first else torch.randn(16, 8))

    def forward(self, x):
        x = x @ self.bank if self.first else x
        x = torch.relu(self.a(x))
        return self.b(x if self.first else F.linear(x, self.bank.t()))


@pytest.mark.parametrize(("first", "prunable"), [(True, 16), (False, 0)])
def test_a_matrix_that_is_a_buffer_freezes_only_what_it_multiplies(first, prunable):
    channels = tcp.trace(Filtered(first), torch.randn(2, 8))
    assert channels.prunable.sum() == prunable
    assert channels.cost()["macs"] == 8 * 16 + (8 * 8 + 16 * 3 if first else 16 * 8 + 8 * 3)


@pytest.mark.parametrize(
    "parametrized",
    [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm],
    ids=["spectral", "weight", "older spectral"],
)
def test_layers_whose_weights_are_computed_are_explained(parametrized):
    first, last = parametrized(nn.Conv2d(3, 8, 3)), parametrized(nn.Linear(6, 2))
    model = nn.Sequential(first, nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    x = torch.randn(2, 3, 8, 8)
    text = tcp.trace(model, x).explain()
    assert [(row.layer, row.channels, row.prunable) for row in text.rows] == [("0", 8, 0), ("1", 6, 0), ("4", 2, 0)]
    why = "weight that is computed"
    assert [row.why for row in text.rows] == [why, f"{why} in 4", why]
    assert len(text.advice) == 1
    assert text.advice[0].startswith("all channels that enter or leave 0, 4 stay: weight that is computed, which")
    with pytest.raises(
        ValueError, match="0 units; all channels that enter or leave 0, 2 stay: weight that is computed"
    ):
        tcp.Tailor(
            nn.Sequential(first, nn.Flatten(), parametrized(nn.Linear(288, 2))), x, budget={"macs": 0.5}, steps=9
        )


def test_channels_of_a_layer_that_can_only_go_together_are_not_called_the_only_one():
    model = nn.Sequential(block(3, 6), nn.Conv2d(6, 6, 1, groups=2), nn.ChannelShuffle(3))
    model.extend([nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 1, 1), nn.ReLU(), nn.Conv2d(1, 4, 1)])
    text = tcp.trace(model, torch.randn(2, 3, 8, 8)).explain()
    words = "all channels of the layer can only go together, by "
    assert text.rows[0].why == (f"{words}convolution of 2 groups in 1 and 1 more; {words}channel_shuffle in 2")
    assert text.rows[3].why == "only channel of a layer"
    assert [sentence.partition(":")[0] for sentence in text.advice] == ["1 units stay"] * 2


@pytest.mark.parametrize("made", [torch.jit.script, lambda part: torch.jit.trace(part, torch.randn(2, 3, 8, 8))])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_is_refused_with_what_to_do(made):
    part, x = made(nn.Conv2d(3, 8, 3).eval()), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^the model is TorchScript .* Give the nn.Module that it was made of"):
        tcp.trace(part, x)
    with pytest.raises(ValueError, match=r"^module '0' of the model is TorchScript"):
        tcp.trace(nn.Sequential(part, nn.ReLU(), nn.Conv2d(8, 4, 1)), x)


# ---------------------------------------------------------------------------------------------------------------------
# What can go


def check(model, x, share=0.5):
    """Assert that gated and smaller network agree, in eval and train mode; return the smaller one and its cost."""
    model, x = model.double(), x.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    channels = tcp.trace(model, x)
    open_units = random_open(channels, share, 1)
    small = remove(model, channels, open_units)
    gated = close(model, channels, open_units)
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(x), gated.train(training)(x), rtol=1e-9, atol=1e-9)
    with FlopCounterMode(display=False) as counter:
        small.eval()(x[:1])
    params = sum(parameter.numel() for parameter in small.parameters())
    assert channels.cost(open_units) == {"macs": counter.get_total_flops() // 2, "params": params}
    return channels, small


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d, lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False)]
)
def test_norms_without_parameters_are_gated(norm, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 12, 3), norm(12), nn.ReLU(), nn.Conv2d(12, 8, 3), norm(8), nn.ReLU())
    model.append(nn.Conv2d(8, 4, 1))
    dense = copy.deepcopy(model)
    channels, small = check(model, torch.randn(2, 3, 8, 8))
    assert channels.prunable.sum() == 20
    assert small[1].num_features == small[0].out_channels < 12
    loaded = tcp.load(dense.double(), tcp.save(small, tmp_path / "small.safetensors"))
    assert loaded[4].num_features == small[4].num_features < 8


def test_a_file_cannot_widen_a_norm_without_parameters(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6))
    path = tcp.save(model, tmp_path / "file.safetensors")
    with safe_open(path, framework="pt") as file:
        spec = json.loads(file.metadata()[storage.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for value in (7, 0, True, None):
        said = {key: what for key, what in spec.items() if key != "sha256"} | {
            "attributes": {"1": {"num_features": value}}
        }
        said["sha256"] = storage._digest(said, tensors)
        save_file(tensors, path, metadata={storage.KEY: json.dumps(said)})
        with pytest.raises(tcp.FileError, match="sets num_features of '1' to"):
            tcp.load(model, path)


def test_a_run_makes_them_smaller_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            nn.Conv2d(3, 16, 3),
            nn.InstanceNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 32, 2, 2, groups=16),
            nn.ReLU(),
        ),
        *(nn.Conv2d(32, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    x, y = torch.randn(8, 3, 8, 8), torch.randint(2, (8,))
    tailor = tcp.Tailor(model, x[:2], budget={"macs": 0.5}, steps=60, multiple=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(tailor(x), y).backward()
        optimizer.step()
        tailor.step()
    assert tailor.finish() is model
    assert model[1].num_features == model[0].out_channels == model[3].in_channels == model[3].groups < 16
    assert model[3].out_channels == model[5].in_channels == 2 * model[3].groups
    assert model[6].num_features == model[5].out_channels


class Shared(nn.Module):
    """One norm that is called on the input, or on two layers, of one width or of two."""

    def __init__(self, how):
        super().__init__()
        widths = {"input": (3, 6), "tied": (6, 6), "two widths": (12, 6)}[how]
        self.norm, self.how = nn.InstanceNorm2d(6 if how != "input" else 3), how
        self.a, self.b, self.c = nn.Conv2d(3, widths[0], 3), nn.Conv2d(widths[0], widths[1], 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.norm(x) if self.how == "input" else x
        x = F.relu(self.norm(self.a(x)))
        x = self.b(x)
        return self.c(F.relu(x if self.how == "input" else self.norm(x)))


@pytest.mark.filterwarnings("ignore:input's size at dim=1")
@pytest.mark.parametrize(("how", "prunable"), [("input", 6), ("tied", 6), ("two widths", 0)])
def test_a_norm_without_parameters_may_be_called_on_anything(how, prunable):
    channels, _ = check(Shared(how), torch.randn(2, 3, 8, 8))
    assert channels.prunable.sum() == prunable


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("groups", "outputs"), [(12, 12), (4, 12), (6, 24), (3, 6)])
@pytest.mark.parametrize("how", ["plain", "norm", "twice"])
def test_transposed_convolutions_lose_whole_groups(kind, groups, outputs, how, tmp_path):
    flat = kind is nn.ConvTranspose1d
    conv = nn.Conv1d if flat else nn.Conv2d
    if how == "twice":
        outputs = 12
    layer = kind(12, outputs, 4, 2, 1, groups=groups)
    norm = [(nn.BatchNorm1d if flat else nn.BatchNorm2d)(outputs)] if how == "norm" else []
    layers = [conv(3, 12, 3), nn.ReLU(), layer, *norm, nn.ReLU(), *([layer] if how == "twice" else [])]
    model = nn.Sequential(*layers, conv(outputs, 4, 1))
    dense = copy.deepcopy(model).double()
    channels, small = check(model, torch.randn(2, 3, *[8] * (1 if flat else 2)))
    assert channels.prunable.sum() == groups
    layer = small[2]
    assert 0 < layer.groups < groups
    assert (layer.in_channels, layer.out_channels) == (12 // groups * layer.groups, outputs // groups * layer.groups)
    assert {row.layer: row.prunable for row in channels.explain().rows}["2"] == outputs
    loaded = tcp.load(dense, tcp.save(small, tmp_path / "small.safetensors"))
    assert (loaded[2].groups, loaded[2].out_channels) == (layer.groups, layer.out_channels)


def test_a_transposed_convolution_whose_groups_are_written_in_a_call_stays():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.kernel = block(3, 8), nn.Conv2d(8, 4, 1), nn.Parameter(torch.randn(8, 1, 2, 2))

        def forward(self, x):
            return self.b(F.conv_transpose2d(self.a(x), self.kernel, stride=2, groups=8))

    channels, _ = check(Written(), torch.randn(2, 3, 8, 8))
    assert not channels.prunable.any()


def unpooled(x, y):
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


def unpooled_elsewhere(x, y):
    return F.max_unpool2d(F.avg_pool2d(x, 2), F.max_pool2d(y, 2, return_indices=True)[1], 2)


def sampled(x, y):
    """Where it is sampled depends on channels, which stay."""
    grid = torch.tanh(y.mean((2, 3)))[:, :2, None, None].expand(-1, -1, 3, 3).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=False)


SPATIAL = {
    "circular": (lambda x, y: F.pad(x, (1, 2, 0, 1), mode="circular"), 16),
    "circular over channels": (lambda x, y: F.pad(x.transpose(1, 3), (1, 1, 1, 1), mode="circular")[..., 1:-1], 8),
    "unpooled": (unpooled, 16),
    "unpooled elsewhere": (unpooled_elsewhere, 8),
    "sampled": (sampled, 8),
    "turned": (lambda x, y: torch.rot90(x, 1, (2, 3)), 16),
    "turned with channels": (lambda x, y: torch.rot90(x, 1, (1, 2)).transpose(1, 2), 16),
    "unfolded": (lambda x, y: x.unfold(2, 3, 2).mean(-1), 16),
    "largest": (lambda x, y: x.flatten(2).topk(3)[0].unsqueeze(-1), 16),
    "sorted": (lambda x, y: x.sort(2, descending=True)[0], 16),
    "sorted channels": (lambda x, y: x.sort(1)[0], 8),
}


class Spatial(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = block(3, 8), block(3, 8), SPATIAL[how][0]
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.b(x)
        x = self.how(self.a(x), y)
        x = x.transpose(1, 3) if x.shape[1] != self.c.in_channels and x.shape[3] == self.c.in_channels else x
        return self.c(x).mean((2, 3)) + self.d(y).mean((2, 3))


@pytest.mark.parametrize("how", SPATIAL)
def test_operators_over_space_leave_channels_alone(how):
    channels, _ = check(Spatial(how), torch.randn(2, 3, 6, 6))
    assert channels.prunable.sum() == SPATIAL[how][1]


def test_circular_padding_of_a_convolution_whose_input_is_raw():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Flatten())
    model.append(nn.Linear(8 * 16, 4))
    channels, _ = check(model, torch.randn(2, 3, 6, 6))
    assert channels.prunable.sum() == 16


SUMS = {
    "energy": (lambda x: x * torch.sigmoid(x.square().sum(1, keepdim=True)), 8),
    "squeezed": (lambda x: x * x.abs().sum((1, 2, 3))[:, None, None, None], 8),
    "normalised": (lambda x: F.normalize(x, dim=1), 8),
    "L1": (lambda x: x / (1 + torch.linalg.vector_norm(x, 1, (1, 2), keepdim=True)), 8),
    "with another": (lambda x: x * torch.cat([x, x.new_ones(len(x), 1, 6, 6)], 1).sum(1, keepdim=True), 8),
    "not zero": (lambda x: x * x.exp().sum(1, keepdim=True), 0),
    "not zero, norm": (lambda x: x * (x + 1).norm(dim=1, keepdim=True), 0),
    "smallest": (lambda x: x * torch.linalg.vector_norm(x, -1, 1, keepdim=True), 0),
    "mean": (lambda x: x * x.mean(1, keepdim=True), 0),
    "mean by hand": (lambda x: x * x.sum(1, keepdim=True) / x.shape[1], 0),
    "largest": (lambda x: x * x.neg().amax(1, keepdim=True), 0),
    "softmax": (lambda x: x * x.softmax(1).sum(1, keepdim=True), 0),
    "logarithm": (lambda x: x * x.logsumexp(1, keepdim=True), 0),
}


@pytest.mark.parametrize("how", SUMS)
def test_a_sum_over_channels_ties_only_what_is_not_zero_when_closed(how):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), Sum(SUMS[how][0]))
    channels, _ = check(model.append(nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 6, 6))
    assert channels.prunable.sum() == SUMS[how][1]


class Sum(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x)


class Towers(nn.Module):
    """A product of two towers, summed: what is summed are the products, zero if either factor is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(2))

    def forward(self, x):
        return (self.a(x) * self.b(x)).sum(-1, keepdim=True)


def test_a_product_of_two_towers_loses_what_both_lose():
    channels, _ = check(Towers(), torch.randn(2, 6))
    assert channels.prunable.sum() == 8 + 8 + 5
