"""A step that would spoil the network is not taken: loss and gradients are looked at before the optimiser steps."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .processes import summed


class Guard:
    """The running statistics of ``network`` before a step, to be put back if the step is refused.

    A forward pass changes buffers before anybody can see its loss, and may put other tensors in their place
    (``self.mean = 0.9 * self.mean + ...``): both are undone.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.buffers = [(module, held) for module in network.modules() if (held := dict(module._buffers))]
        # one copy of all that are alike: one each would be fifty launches more at every step on a GPU
        alike: dict[tuple, list[Tensor]] = {}
        for _, held in self.buffers:
            for buffer in held.values():
                if buffer is not None:
                    plain = type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_quantized
                    alike.setdefault((buffer.dtype, buffer.device) if plain else (id(buffer),), []).append(buffer)
        self.copies = [(buffers, _copied(buffers)) for buffers in alike.values()]

    def check(self, loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Raise FloatingPointError, in all processes, if in any of them ``loss`` or a gradient is not finite.

        Call it after the backward pass: then gradients and statistics are as before the step, and weights and the
        optimiser's state have not been touched. The largest gradient of all is found on the device, and one number,
        for loss and gradients together, is waited for.
        """
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in _with_gradient(trained)]
        largest = get_total_norm(gradients, norm_type=math.inf).to(loss.device)  # a 2-norm overflows with its squares
        finite = torch.stack([loss.detach().isfinite(), largest.isfinite()])
        if int(summed((~finite).sum())):
            self._refuse(loss.detach(), finite, trained, optimizer, step)

    def _refuse(
        self, loss: Tensor, finite: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> NoReturn:
        if not finite[0]:
            what = f"the loss is {loss.item()} at step {step}"
        elif not finite[1]:
            bad = [name for name, p in trained.named_parameters() if p.grad is not None and not _all_finite(p.grad)]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            what = f"the loss is {loss.item():.4g}, but the gradient of {bad[0]!r}{more} is not finite at step {step}"
        else:
            what = f"in another process the loss or a gradient is not finite at step {step}"
        self.put_back()
        spoiled = [name for name, p in trained.named_parameters() if not _all_finite(p)]
        before = (
            f" Already before it weights were not finite ({spoiled[0]!r}): an earlier step spoiled them, so start "
            f"again or go back to a checkpoint."
            if spoiled
            else ""
        )
        raise FloatingPointError(
            f"{what}; weights, running statistics and the optimiser's state are as before, this step was not taken. "
            f"Lower lr (now {optimizer.param_groups[0]['lr']:.3g}), lengthen warmup, or look for images whose values "
            f"are not finite.{before}"
        )

    @torch.no_grad()
    def put_back(self) -> None:
        """Have running statistics be as before the step, and gradients gone."""
        self.network.zero_grad()  # of the gates too
        for module, held in self.buffers:
            module._buffers.clear()
            module._buffers.update(held)
        for buffers, values in self.copies:
            parts = values.split([buffer.numel() for buffer in buffers]) if len(buffers) > 1 else [values]
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part if part.shape == buffer.shape else part.view(buffer.shape))


def _copied(buffers: list[Tensor]) -> Tensor:
    if len(buffers) == 1:
        return buffers[0].detach().clone()
    return torch.cat([buffer.detach().flatten() for buffer in buffers])


def _with_gradient(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def _all_finite(tensor: Tensor) -> bool:
    tensor = tensor.detach()
    return bool((tensor.coalesce().values() if tensor.is_sparse else tensor).isfinite().all())
