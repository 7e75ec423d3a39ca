"""From labels to units: tied labels become one unit, and what is known about parameters becomes :class:`Channels`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from ..channels import Channels, Family, GateSite, Layer, Padding, Weightless
from ..cost import CostBuilder, CostModel
from ..explanation import NOT_UNDERSTOOD, Cause
from ..memory import Activations, Storage
from ..removal import groups_of, tensor_shapes
from .codes import labels_in
from .identities import Identities


class Units:
    """The units of the labels gathered so far."""

    def __init__(self, ids: Identities) -> None:
        self.ids = ids
        ties = torch.cat(ids.ties) if ids.ties else torch.zeros((0, 2), dtype=torch.int64)
        a, b = ties.T.to(torch.int32).numpy()  # of indices of 64 bits scipy 1.11.1 takes what is in unwritten memory
        graph = coo_array((torch.ones(len(ties)).numpy(), (a, b)), shape=(ids.labels, ids.labels))
        self.component = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
        frozen = self._mask(ids.frozen)
        self.fixed: list[tuple[str, str, str, Tensor]] = []
        slots = self._entry_slots(frozen)
        for (name, _), labels in ids.dims.items():
            if name in ids.fixed:
                frozen[self.component[labels]] = True
                self.fixed.append(("fixed", name, "", labels))
        outputs = self._mask(ids.outputs)
        read = self._mask([ids.dims[w, 1 - dim] for w, dim in ids.layers.items() if (w, 1 - dim) in ids.dims])
        # Channels that only leave the model, such as a classifier's, are fixed and no units.
        is_unit = self._mask(ids.producers) & ~(outputs & ~read)
        self.index = torch.where(is_unit, is_unit.cumsum(0) - 1, -1)
        self.frozen = (frozen | outputs)[is_unit]
        for (name, dim), labels in ids.dims.items():
            slots.setdefault(name, [None] * _tensor(ids, name).ndim)[dim] = labels
        self.slots = {name: tuple(None if x is None else self.of(x) for x in dims) for name, dims in slots.items()}
        self.slots = {n: d for n, d in self.slots.items() if any(u is not None and (u >= 0).any() for u in d)}

    def of(self, labels: Tensor) -> Tensor:
        """Return the unit of each label, -1 for none."""
        return self.index[self.component[labels]]

    def labels(self, units: Tensor) -> Tensor:
        """Return every label of these units."""
        return torch.isin(self.of(torch.arange(self.ids.labels)), units).nonzero().flatten()

    def channels(self, ignored: Mapping[str, set[nn.Module]], examples: Sequence[tuple[tuple, dict]]) -> Channels:
        """Return the units as the value that everything else works with."""
        ids = self.ids
        cost_model = self._cost_model()
        outputs = {
            w: ids.outputs_beside[w] if w in ids.outputs_beside else ids.dims[w, d] for w, d in ids.layers.items()
        }
        modules = Counter(w.rpartition(".")[0] for w in outputs)
        names = {w: m if modules[m := w.rpartition(".")[0]] == 1 else w for w in outputs}  # a module may hold several
        layers = tuple(Layer(names[w], w, self.of(labels)) for w, labels in outputs.items())
        plain = {layer.name for layer in layers}
        sole, bundled = _sole(cost_model)
        prunable = ~self.frozen & ~sole & ~bundled
        patterns = tuple(ignored)
        ignored = {pattern: self._kept(modules, layers) for pattern, modules in ignored.items()}
        for units in ignored.values():
            prunable[units] = False
        causes = self._causes(ignored, sole, bundled)
        unknown = {(c.what, c.where): None for c in causes if c.kind in NOT_UNDERSTOOD}
        return Channels(
            units=len(self.frozen),
            families=_families(cost_model, self.slots, layers),
            frozen=self.frozen,
            prunable=prunable,
            unknown=tuple(unknown),
            causes=causes,
            slots=self.slots,
            layers=layers,
            weightless=tuple(Weightless(name, *how) for name, how in ids.weightless.items() if name not in plain),
            sites=self._sites(),
            paddings=tuple(Padding(m, at, self.of(front), self.of(back)) for m, (at, front, back) in ids.pads.items()),
            shapes=tensor_shapes(ids.model),
            groups=groups_of(ids.model),
            cost_model=cost_model,
            state=self._state(),
            activations=self._activations(),
            example=examples[0],
            also=tuple(examples[1:]),
            ignored=patterns,
        )

    def _kept(self, modules: set[nn.Module], layers: Sequence[Layer]) -> Tensor:
        """Return the units in the outputs of these modules, and of layers whose weights they hold (which another module
        may use without calling them).
        """
        names = {id(p): name for name, p in self.ids.model.named_parameters()}
        weights = {names[id(p)] for module in modules for p in module.parameters(recurse=False)}
        units = [
            self.of(labels_in(codes)).flatten() for module in modules for codes in self.ids.watched.get(module, ())
        ]
        units += [layer.out_units for layer in layers if layer.weight in weights]
        units += [self.of(gate.labels) for weight, gate in self.ids.norms.items() if weight in weights]
        units = torch.cat(units).unique() if units else torch.zeros(0, dtype=torch.int64)
        return units[units >= 0]

    def _causes(self, ignored: Mapping[str, Tensor], sole: Tensor, bundled: Tensor) -> tuple[Cause, ...]:
        """Return why units stay, each cause once, in the order in which they were met."""
        found: dict[tuple[str, str, str], list[Tensor]] = {}
        for kind, what, where, labels in (*self.ids.causes, *self.fixed):
            found.setdefault((kind, what, where), []).append(self.of(labels))
        outputs = [self.of(labels) for labels in self.ids.outputs]
        found |= {("output", "", ""): outputs} if outputs else {}
        found |= {("ignored", f"ignore={pattern!r}", ""): [units] for pattern, units in ignored.items()}
        found[("sole", "", "")] = [sole.nonzero().flatten()]
        left = bundled.clone()
        for what, where, labels in self.ids.bundles:
            units = self.of(labels).unique()
            units = units[units >= 0]
            left[units] = False
            found.setdefault(("together", what, where), []).append(units[bundled[units]])
        found[("together", "what follows", "")] = [left.nonzero().flatten()]
        causes = [Cause(*key, torch.cat(units).unique()) for key, units in found.items()]
        causes = [cause._replace(units=cause.units[cause.units >= 0]) for cause in causes]
        return tuple(cause for cause in causes if len(cause.units))

    def _mask(self, labels: Sequence[Tensor]) -> Tensor:
        mask = torch.zeros(int(self.component.max()) + 1, dtype=torch.bool)
        if labels:
            mask[self.component[torch.cat([each.reshape(-1) for each in labels])]] = True
        mask[self.component[0]] = False
        return mask

    def _entry_slots(self, frozen: Tensor) -> dict[str, list[Tensor | None]]:
        """Return labels by dimension for parameters used element by element; freeze what no dimension describes."""
        slots: dict[str, list[Tensor | None]] = {}
        registered = {name for name, _ in self.ids.dims}
        for name, labels in self.ids.entries.items():
            components = self.component[labels]
            dims = [d for d in range(labels.ndim) if (components != components.narrow(d, 0, 1)).any()]
            if name in registered and dims == [0] == [*range(labels.ndim)]:
                # a layer's bias, added by itself where the layer runs as a bare product: the same channels in both
                if torch.equal(components, self.component[self.ids.dims[name, 0]]):
                    continue
            if len(dims) > 1 or name in self.ids.fixed or name in registered:
                frozen[components.reshape(-1)] = True
                self.fixed.append(("fixed", name, "", labels.reshape(-1)))
                self.ids.fixed.add(name)
                continue
            dim = dims[0] if dims else max(range(labels.ndim), key=lambda d: labels.shape[d])
            at = tuple(slice(None) if d == dim else 0 for d in range(labels.ndim))
            slots[name] = [labels[at] if d == dim else None for d in range(labels.ndim)]
        return slots

    def _sites(self) -> tuple[GateSite, ...]:
        norms = [
            GateSite(w, gate.bias, self.of(gate.labels), constant=gate.constant) for w, gate in self.ids.norms.items()
        ]
        raw = [GateSite(w, gate.bias, self.of(gate.labels), dim) for (w, dim), gate in self.ids.raw.items()]
        with_layer = {site.bias for site in norms + raw}
        added = [
            GateSite(name, None, units, dim)
            for name in self.ids.added - with_layer
            for dim, units in enumerate(self.slots.get(name, ()))
            if units is not None
        ]
        return tuple(site for site in norms + raw + added if (site.units >= 0).any())

    def _cost_model(self) -> CostModel:
        builder = CostBuilder(len(self.frozen))
        for scale, *sides in self.ids.calls:
            builder.add("macs", scale, *(None if labels is None else self.of(labels) for labels in sides))
        builder.add("macs", self.ids.constant_macs)
        for name, parameter in self.ids.model.named_parameters():
            dims = self.slots.get(name, (None,) * parameter.ndim)
            fixed = math.prod(size for size, units in zip(parameter.shape, dims, strict=True) if units is None)
            builder.add("params", fixed, *(units for units in dims if units is not None))
        return builder.build()

    def _state(self) -> CostModel:
        """Return the bytes of parameters and buffers, by item size of floating-point numbers ("0": of all others)."""
        tensors = [*self.ids.model.named_parameters(), *self.ids.model.named_buffers()]
        sizes = [str(tensor.element_size()) if tensor.is_floating_point() else "0" for _, tensor in tensors]
        builder = CostBuilder(len(self.frozen), sorted(set(sizes)))
        for (name, tensor), size in zip(tensors, sizes, strict=True):
            dims = self.slots.get(name, (None,) * tensor.ndim)
            fixed = math.prod(n for n, units in zip(tensor.shape, dims, strict=True) if units is None)
            builder.add(size, fixed * tensor.element_size(), *(units for units in dims if units is not None))
        return builder.build()

    def _activations(self) -> Activations:
        alive = self.ids.liveness
        storages = [Storage(size, itemsize, self.of(labels)) for size, itemsize, labels in alive.storages]
        work = [(operator, [storages[index] for index in touched]) for operator, touched in alive.work]
        return Activations(len(self.frozen), storages, [sorted(moment) for moment in alive.moments], work)


def _tensor(ids: Identities, name: str) -> Tensor:
    module, _, key = name.rpartition(".")
    return getattr(ids.model.get_submodule(module), key)


def _sole(model: CostModel) -> tuple[Tensor, Tensor]:
    """Return the units that are all that some channel count consists of, bool ``[units]``: those that are one channel
    there, and those that are several, which can only go together.
    """
    totals = model.counts(torch.ones(model.units))
    whole = model.times >= totals[model.rows]
    sole, bundled = torch.zeros(2, model.units, dtype=torch.bool)
    bundled[model.columns[whole & (model.times > 1)]] = True
    sole[model.columns[whole]] = True
    return sole & ~bundled, bundled


def _families(model: CostModel, slots: dict, layers: Sequence[Layer]) -> tuple[Family, ...]:
    """Group units that stand in the same channel counts equally often (compared by two random sums over the counts)."""
    if not model.units:
        return ()
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(1 << 24, (len(model.fixed), 2), generator=generator).double()
    sums = torch.zeros(model.units, 2, dtype=torch.float64)
    sums.index_add_(0, model.columns, model.times[:, None] * keys[model.rows])
    family = sums.unique(dim=0, return_inverse=True)[1]
    members: dict[int, dict[str, None]] = {}
    times: dict[int, set[int]] = {}
    for layer in layers:
        for units in slots.get(layer.weight, ()):
            if units is not None:
                there, counts = units[units >= 0].unique(return_counts=True)
                for index, count in set(zip(family[there].tolist(), counts.tolist(), strict=True)):
                    members.setdefault(index, {})[layer.name] = None
                    times.setdefault(index, set()).add(count)
    parts = family.argsort(stable=True).split(family.bincount().tolist())
    found = [
        Family(units, tuple(members.get(index, ())), tuple(sorted(times.get(index, {1}))))
        for index, units in enumerate(parts)
    ]
    return tuple(sorted(found, key=lambda each: int(each.units[0])))
