"""What of a network can be pruned, what cannot, and why: a value that prints as text and as a table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ADVICE = {
    "unknown": "{what} in {where}: its effect on channels is not known; another operator, or a layer of torch's own "
    "that does the same, would free them",
    "attribute": "{what} in {where}: a plain tensor cannot follow; make it a buffer or a parameter (register_buffer)",
    "computed": "{where}: a size is written in the code or computed from a shape; x.flatten(1) instead of "
    "x.view(-1, 64), torch.zeros_like(x) instead of torch.zeros(x.shape), a module's own attribute",
    "changing": "the outputs differ from run to run, so nothing can be compared; make forward repeatable in eval mode",
    "unreached": "{what}: no traced call reaches it, so what it takes must stay; trace a call that does "
    "(also=[...]), or name it in unused=[...]",
    "ignored": "{what}: take it out of ignore",
    "fixed": "{what}: a parameter of which only some entries would go, that is used in more than one way, or that "
    "forward itself changes",
    "lifted": "{what} in {where}: a closed channel would not be zero there, after a sigmoid or an added constant; an "
    "activation that keeps zero, or a batch norm before the layer, would free them",
    "tied": "{where}: tied to channels that stay, such as the model's input or a constant of one size; a convolution "
    "in between would free them",
    "together": "{what} in {where}: it ties all channels of a layer to one another, so none can go without the last; "
    "smaller groups, or a layer that mixes them in between, would free them",
}
"""By kind of cause, why units stay, and what would free them; of "output", "sole" and "weight" it says nothing, see
:func:`without_parameters`.
"""

NOT_UNDERSTOOD = ("unknown", "attribute", "computed", "changing", "weight")
"""The kinds of causes that ``channels.unknown`` lists."""


class Cause(NamedTuple):
    """Why some units stay: the kind (a key of ``WORDS``), what and where, and the units (int64)."""

    kind: str
    what: str
    where: str
    units: Tensor


WORDS = {
    "unknown": "unknown operator {what} in {where}",
    "attribute": "{what} in {where}",
    "computed": "{what} ({where})",
    "changing": "{what}",
    "unreached": "{what}, which no traced call reaches",
    "ignored": "{what}",
    "fixed": "parameter {what} keeps its shape",
    "lifted": "not zero when closed, at {what} in {where}",
    "tied": "tied to what stays, at {where}",
    "output": "output of the model",
    "sole": "only channel of a layer",
    "together": "all channels of the layer can only go together, by {what} in {where}",
    "weight": "{what} in {where}",
}


def in_words(causes: Iterable[Cause], most: int = 4) -> str:
    """Say in a few words why units stay; what is the same in several modules once, and at most so many things."""
    places: dict[tuple[str, str], list[str]] = {}
    for cause in causes:
        places.setdefault((cause.kind, cause.what if cause.kind != "tied" else ""), []).append(
            cause.where or "the model"
        )
    parts = []
    for (kind, what), where in places.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        parts.append(WORDS[kind].format(what=what, where=where[0] + more))
    more = [f"{len(parts) - most} more"] if len(parts) > most else []
    return "; ".join(parts[:most] + more)


REMARKS = "why not the others; layers that lose theirs with it"


class Row(NamedTuple):
    """One layer: its channels, how many can go, which layers lose theirs with it, and what keeps the others."""

    layer: str
    channels: int
    prunable: int
    tied: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Explanation:
    """What of a network can be pruned, what cannot, and why; prints as text, and as a table in a notebook.

    Attributes:
        rows: one a convolution or linear layer.
        dense, floor: each cost of the dense network, and of the smallest one (one unit in each family).
        held: by cause (in words), the share of each dense cost by which the floor would be lower if its units could go.
        advice: what would free units, one sentence a cause, the one that holds most macs first.
        units, prunable: number of units, and of those that can go.
    """

    rows: tuple[Row, ...]
    dense: Mapping[str, int]
    floor: Mapping[str, int]
    held: Mapping[str, Mapping[str, float]]
    advice: tuple[str, ...]
    units: int
    prunable: int

    def __repr__(self) -> str:
        width = max([len(row.layer) for row in self.rows] or [5])
        lines = [
            self._summary(),
            f"{'layer':{width}}{'channels':>10}{'prunable':>10}  why not the others; layers that lose theirs with it",
        ]
        lines += [f"{r.layer:{width}}{r.channels:>10,}{r.prunable:>10,}  {_remarks(r)}".rstrip() for r in self.rows]
        return "\n".join(lines + [f"- {sentence}" for sentence in self.advice])

    def _repr_html_(self) -> str:
        cells = [("layer", "channels", "prunable", REMARKS)]
        cells += [(row.layer, f"{row.channels:,}", f"{row.prunable:,}", _remarks(row)) for row in self.rows]
        table = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
            for tag, line in zip(["th"] + ["td"] * len(self.rows), cells, strict=True)
        )
        advice = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.advice)
        return f"<p>{html.escape(self._summary())}</p><table>{table}</table><ul>{advice}</ul>"

    def _summary(self) -> str:
        floors = [f"{self.floor[n]:,} {n} ({self.floor[n] / max(dense, 1):.1%})" for n, dense in self.dense.items()]
        return f"{self.prunable:,} of {self.units:,} units can go; the smallest network has {' and '.join(floors)}"


def _remarks(row: Row) -> str:
    tied = ", ".join(row.tied[:4]) + (f" and {len(row.tied) - 4} more" if len(row.tied) > 4 else "")
    return "; ".join(filter(None, [row.why, f"layers tied: {tied}" if tied else ""]))


def advice(causes: Iterable[Cause]) -> tuple[str, ...]:
    """Return a sentence per cause that a user could do something about, with the number of units."""
    found: dict[tuple[str, str], list[Cause]] = {}
    for cause in causes:
        if cause.kind in ADVICE:
            found.setdefault((cause.kind, cause.what), []).append(cause)
    sentences = []
    for (kind, what), group in found.items():
        where = _few([cause.where or "the model" for cause in group])
        count = len(torch.cat([cause.units for cause in group]).unique())
        sentences.append(f"{count:,} units stay: {ADVICE[kind].format(what=what, where=where)}")
    return tuple(sentences)


def without_parameters(layers: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return a sentence for each way in which weights, given as what they are and their layer, are no parameters."""
    found: dict[str, list[str]] = {}
    for what, layer in layers:
        found.setdefault(what, []).append(layer)
    return tuple(
        f"all channels that enter or leave {_few(names)} stay: {what}, which can be neither gated nor cut; take "
        f"spectral_norm, weight_norm or another parametrization off, or make the weight a parameter"
        for what, names in found.items()
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
