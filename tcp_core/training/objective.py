"""What a network is trained for: its loss, how good it is said to be, and a teacher to learn from."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .randomness import reached

IGNORED = -100  # the label that torch's cross-entropy passes over


@dataclass(frozen=True)
class Objective:
    """A loss and what is counted beside it, from a network's outputs and the batch's targets.

    loss: called as ``loss(outputs, targets)`` for one number; None for cross-entropy with ``label_smoothing``.
    metric: called likewise for the batch's mean of what takes the accuracy's place; None for the accuracy, where
        outputs are ``[batch, classes, ...]`` and targets their labels, and NaN elsewhere.
    teacher: from :func:`teacher_of`, or None; ``teacher_weight`` and ``temperature`` as in :func:`distillation`.
    """

    loss: Callable[[Any, Any], Tensor] | None = None
    metric: Callable[[Any, Any], Tensor | float] | None = None
    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    teacher_weight: float = 0.5
    temperature: float = 4.0

    def trained_on(self, outputs: Any, targets: Any, lesson: Tensor | None, where: str) -> Tensor:
        """Return what is minimised; ``lesson`` is the teacher's outputs, ``where`` names the batch in errors."""
        loss = self._loss(outputs, targets, where, self.label_smoothing)
        if lesson is None:
            return loss
        taught = distillation(outputs, lesson, self.temperature)
        return (1 - self.teacher_weight) * loss + self.teacher_weight * taught

    def held_out(self, outputs: Any, targets: Any, where: str) -> Tensor:
        """Return the loss without smoothing and teacher."""
        return self._loss(outputs, targets, where, 0.0)

    def _loss(self, outputs: Any, targets: Any, where: str, smoothing: float) -> Tensor:
        if self.loss is None:
            check_labels(outputs, targets, where)
            return F.cross_entropy(outputs, targets, label_smoothing=smoothing)
        loss = self.loss(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            said = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"loss= gave {said} in {where}; it must give one number, the mean over the batch.")
        return loss.squeeze()

    def weight(self, targets: Any, images: int) -> Tensor:
        """Return over how many of the batch's images its loss is the mean: of cross-entropy those that have labels, one
        of which a part of the pixels has them as that part.
        """
        if self.loss is not None or targets.is_floating_point():
            return torch.tensor(float(images))
        return (targets != IGNORED).sum() * images / max(1, targets.numel())

    def score(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the sum over the batch's images of the metric, or of how much of each the network is right about, and
        over how many images it is: for the latter those that have labels.
        """
        count = torch.tensor(float(size_of(targets)))
        if self.metric is not None:
            metric = torch.as_tensor(self.metric(outputs, targets)).detach()
            return metric * count.to(metric.device), count
        nothing = torch.tensor(float("nan")), count
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim < 2:
            return nothing
        labels = targets
        if targets.is_floating_point():  # the share of each class, which mixing makes of labels
            if self.loss is not None or targets.shape != outputs.shape:
                return nothing
            labels = targets.argmax(1)
        if outputs.shape[1] < 2 or labels.shape != outputs.shape[:1] + outputs.shape[2:]:
            return nothing
        right = (outputs.detach().argmax(1) == labels).reshape(len(labels), -1)
        known = (labels != IGNORED).reshape(len(labels), -1)
        return ((right & known).sum(1) / known.sum(1).clamp(min=1)).sum(), known.any(1).sum()

    def described(self) -> dict[str, Any]:
        """Return, in plain values, what tells this objective from another one of the same functions."""
        taught = {"teacher": None}
        if self.teacher is not None:
            taught = {"teacher": _fingerprint(self.teacher), "teacher_weight": float(self.teacher_weight)}
            taught["temperature"] = float(self.temperature)
        return {"label_smoothing": float(self.label_smoothing), **taught}


def check_functions(**functions: Any) -> None:
    """Raise TypeError for a loss or metric that is neither a function nor None, such as a class itself."""
    for name, function in functions.items():
        if function is None or (callable(function) and not isinstance(function, type)):
            continue
        said, how = repr(function), f"such as {name}=torch.nn.functional.mse_loss"
        if isinstance(function, type):
            said, how = function.__name__, f"such as {name}={function.__name__}()"
        raise TypeError(f"{name}={said}; it must be a function of (outputs, targets), {how}, or None.")


def check_parameters(loss: Any, network: nn.Module, optimizer: torch.optim.Optimizer, kept: bool) -> None:
    """Warn of parameters in a loss that nothing trains; raise ValueError for some that the optimiser trains and that
    are not ``kept``: checkpoints have, and processes average, those of the network alone.
    """
    own = {id(parameter) for parameter in network.parameters()}
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if not kept and trained - own:
        raise ValueError(
            f"the optimizer holds {len(trained - own)} parameters that are not the network's. They would be in no "
            f"checkpoint, and no average over processes: make their module a part of the network, or leave checkpoints "
            f"out and train in one process."
        )
    left = [
        f"{place}.{name}"
        for place, module in reached(nn.Module, loss=loss).items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in own | trained
    ]
    if left:
        warnings.warn(
            f"{left[0]}{f' and {len(left) - 1} more' * (len(left) > 1)} requires a gradient, and fit trains the "
            f"network's parameters only. To train it, make its module a part of the network; else set "
            f"requires_grad_(False) on it.",
            stacklevel=3,
        )


def check_labels(outputs: Any, targets: Any, where: str) -> None:
    """Raise unless cross-entropy is defined for these: outputs one tensor, and labels among its classes."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        said = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the network returns {said} in {where}, and cross-entropy needs logits [batch, classes]. Give loss=, a "
            f"function of (outputs, targets)."
        )
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets are {type(targets).__name__} in {where}; give loss=, a function of them.")
    if targets.is_floating_point():
        return
    classes = outputs.shape[1]
    wrong = ((targets < 0) | (targets >= classes)) & (targets != IGNORED)
    if wrong.any():
        raise ValueError(
            f"label {int(targets[wrong][0])} in {where}, but the network has {classes} outputs: 0 to {classes - 1}. "
            f"Correct the labels, or build the network with as many outputs as there are classes."
        )


def distillation(outputs: Tensor, lesson: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || network) of softmax(logits / T), times T^2.

    Mean over the batch (and pixels); the factor T^2 keeps its gradient as large as that of the labels (Hinton, Vinyals
    and Dean 2015, section 2).
    """
    student, teacher = (F.log_softmax(logits / temperature, 1) for logits in (outputs, lesson))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean()


def teacher_of(model: nn.Module | None, device: torch.device) -> nn.Module | None:
    """Return a frozen copy of a network in eval mode on ``device``, None for None.

    A copy, because the teacher may be the very network that is trained, and because the user's stays as it is.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"teacher is a {type(model).__name__}; it must be a network, or None.")
    return None if model is None else copy.deepcopy(model).to(device).eval().requires_grad_(False)


def taught(teacher: nn.Module, x: Tensor) -> Any:
    """Return the teacher's outputs, computed in its own precision; whole numbers stay what they are."""
    parameter = next(teacher.parameters(), x)
    with torch.no_grad():
        return teacher(x.to(parameter.dtype) if x.is_floating_point() else x)


def check_teacher(outputs: Any, lesson: Any) -> None:
    """Raise ValueError unless the outputs of network and teacher are logits of the same shape."""
    for who, logits in (("network", outputs), ("teacher", lesson)):
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise ValueError(
                f"teacher= compares logits [batch, classes], and the {who} returns {type(logits).__name__}; call the "
                f"teacher in a loss= of your own instead."
            )
    if outputs.shape != lesson.shape:
        raise ValueError(
            f"the teacher's outputs have shape {tuple(lesson.shape)} and the network's {tuple(outputs.shape)}; give a "
            f"teacher of the same classes."
        )


def in_full_precision(outputs: Any) -> Any:
    """Return outputs in which half-precision tensors, at any depth of tuples, lists and dicts, are float32."""
    half = (torch.float16, torch.bfloat16)
    return pytree.tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in half else x, outputs)


def size_of(targets: Any) -> int:
    """Return the number of images that targets (a tensor, or tuples, lists and dicts of some) belong to."""
    tensors = [leaf for leaf in pytree.tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else len(targets)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
