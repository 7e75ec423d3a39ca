"""A moving average of a network's weights, which becomes smaller with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import Channels
from ..removal import take


class Average:
    """The moving average of all parameters and floating buffers of ``model``, by name.

    After step n the average moves by ``1 - min(decay, (1 + n) / (10 + n))`` towards the weights, so that the first
    steps of a short run are soon forgotten (as TensorFlow's ExponentialMovingAverage with num_updates).

    Not torch's AveragedModel: this one must be cut by the names of its tensors when the network becomes smaller, be put
    into a gated network for validation, and go into a checkpoint.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.restart(model)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Begin anew at the weights as they are."""
        self.count, self.values = 0, {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights as they are."""
        self.count += 1
        share = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        for name, tensor in _tensors(model):
            self.values[name].lerp_(tensor.detach(), share)

    def cut(self, channels: Channels, open_units: Tensor) -> None:
        """Keep the channels of ``open_units`` (bool ``[units]``) of the dense network's average."""
        self.values = {name: take(value, channels.kept(name, open_units)) for name, value in self.values.items()}

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Put the average into the model and what was there into the average."""
        for name, tensor in _tensors(model):
            there = self.values[name]
            self.values[name] = tensor.detach().clone()
            tensor.copy_(there)

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Have the model compute with the average, for as long as the context lasts."""
        self.exchange(model)
        try:
            yield
        finally:
            self.exchange(model)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"count": self.count, "values": self.values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.count = state["count"]
        self.values = {name: value.to(self.values[name].device) for name, value in state["values"].items()}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())
