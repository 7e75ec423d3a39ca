"""Running a model once while every activation carries, beside it, the identity of each element's channel.

The mechanism is that of torch's own flop counter, a ``TorchDispatchMode``: after each operator a rule gives its
outputs their codes (see :mod:`.codes`). Ties between labels, frozen labels and what is known about parameters
accumulate here over runs in train and eval mode; :mod:`.units` makes units of them.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..outputs import tensors_in
from ..state import tensor_attributes
from ..verification import WholeDropout, has_values, nothing_to_compare, steady
from .calls import Call, Gate
from .codes import compact, labels_in, varies
from .counting import constant_macs
from .liveness import Liveness
from .routing import found_one, picks, with_a_row
from .whole import WholeFunctions

ALPHA = nn.AlphaDropout, nn.FeatureAlphaDropout
"""Dropouts that put another number than zero, also into closed channels: how they train shows that."""

HERE = Path(__file__).parent

LARGE = 1 << 20
"""A parameter with more entries than this is not followed entry by entry."""


Rule = Callable[["Identities", Call], None]

ModuleRule = Callable[["Identities", tuple, list[Tensor]], None]
"""Takes the place of rules for operators while a module runs: given its arguments, it gives outputs their codes."""


FunctionRule = Callable[["Identities", str, tuple, dict], ModuleRule | None]
"""Given a function that begins to run, by name, and its arguments, returns the rule for all that it consists of."""


class Identities(TorchDispatchMode):
    """Codes beside activations; ties, frozen labels and parameters' labels gathered on the way.

    Attributes:
        labels: number of labels handed out; label 0 means no channel.
        ties: label pairs, int64 ``[n, 2]`` each.
        bundles: (what, where, labels) of those of one tensor that an operator ties to one another.
        frozen, outputs, producers: labels that must stay; that leave the model; that layers or padding made.
        causes: (kind, what, where, labels that it froze), see :data:`~tcp_core.explanation.ADVICE`.
        attributes: names of plain tensors that modules keep.
        ran: modules that were called.
        reached: ids of parameters that an operator took.
        shapes, seen: the shapes of all tensors, and all codes.
        watched: modules of which the codes of their outputs are of interest, and these.
        dims: labels along a dimension of a parameter or buffer, 0 where it is fixed.
        entries: labels of every entry, for parameters that were used element by element.
        added: such parameters that need a gate, because a closed channel would not be zero without.
        fixed: parameters that must keep their shape.
        ungated: weights that norms do not have and in whose place no gate can stand.
        norms, raw: gates of batch norms; of layers whose raw output is used, by weight and dimension.
        layers: output dimension of each convolution or linear layer, by weight, in the order in which they ran.
        outputs_beside: labels of the outputs of weights that have no dimension for them.
        weightless: layers that ran with a weight that is no parameter: what it is instead, how many outputs, and how
            many ``layers`` ran before.
        calls: macs as (scale, labels of inputs, labels of outputs); constant_macs: those of activations with
            activations.
        uncounted: operators that take matrices of parameters and are in no count, with the module in which they ran.
        routed: modules with macs on as many rows as values decide.
        pads: padding modules that add channels, with the place of the amounts and the labels before and after.
        liveness: which activations are alive when, in the eval run.
        operators: how often each operator ran in each mode; not those of norms and dropout, and on integers.
    """

    def __init__(
        self,
        model: nn.Module,
        rule_of: Callable[[Any, str], Rule],
        rule_within: Callable[[nn.Module], ModuleRule | None],
        rule_of_function: FunctionRule,
    ) -> None:
        super().__init__()
        self.model = model
        self.rule_of = rule_of
        self.rule_within = rule_within
        self.rule_of_function = rule_of_function
        self.labels = 1
        self.ties: list[Tensor] = []
        self.bundles: list[tuple[str, str, Tensor]] = []
        self.frozen: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.producers: list[Tensor] = []
        self.causes: list[tuple[str, str, str, Tensor]] = []
        self.watched: dict[nn.Module, list[Tensor]] = {}
        self.ran: set[nn.Module] = set()
        self.reached: set[int] = set()
        self.shapes: set[tuple[int, ...]] = set()
        self.seen: list[Tensor] = []
        self.dims: dict[tuple[str, int], Tensor] = {}
        self.entries: dict[str, Tensor] = {}
        self.added: set[str] = set()
        self.fixed: set[str] = set()
        self.ungated: set[str] = set()
        self.norms: dict[str, Gate] = {}
        self.raw: dict[tuple[str, int], Gate] = {}
        self.layers: dict[str, int] = {}
        self.outputs_beside: dict[str, Tensor] = {}
        self.weightless: dict[str, tuple[str, int, int]] = {}
        self.calls: list[tuple[float, Tensor | None, Tensor | None]] = []
        self.constant_macs = 0
        self.uncounted: dict[str, str] = {}
        self.routed: dict[str, None] = {}
        self.pads: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.operators: dict[str, Counter[str]] = {"train": Counter(), "eval": Counter()}

    def run(self, mode: str, args: tuple, kwargs: dict, count: bool = False) -> None:
        """Run the model in ``mode`` ("train" or "eval"), and ``count`` macs and bytes."""
        self.counting, self.mode = count, mode
        self.codes = WeakTensorKeyDictionary()
        # by activation, what must be gated for it to be zero where a channel is closed: a layer's weight (with the
        # dimension, and a bias), or by itself a bias
        self.needs = WeakTensorKeyDictionary()
        self.transposed = WeakTensorKeyDictionary()  # two-dimensional views of a parameter: (name, whether transposed)
        self.moved = WeakTensorKeyDictionary()  # a parameter's entries, moved: its name
        self.storages: dict[int, list[weakref.ref]] = {}
        self.stack: list[nn.Module] = []
        self.arguments: tuple = ()
        self.within: ModuleRule | None = None
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.liveness = Liveness(self.model, inputs) if self.counting else None
        self.fed = WeakTensorKeyDictionary(dict.fromkeys(inputs, True))  # what depends on the inputs
        self.picked = WeakTensorKeyDictionary()  # what has as many rows as values decide
        self.shapes |= {tuple(tensor.shape) for tensor in inputs}
        self.names, self.parameters = WeakTensorKeyDictionary(), dict(self.model.named_parameters())
        for name, tensor in (*self.model.named_buffers(), *self.parameters.items()):
            self.names[tensor] = name
        self.modules = {module: name for name, module in self.model.named_modules()}
        self.attributes = WeakTensorKeyDictionary()
        for name, tensor in tensor_attributes(self.model).items():
            self.attributes[tensor] = f"tensor attribute {name!r}"
        before = {name: (p.data_ptr(), p._version) for name, p in self.model.named_parameters()}
        self.places: dict[int, list[tuple[str, int, int]]] = {}  # by storage: a parameter's name, first and last byte
        for name, p in self.model.named_parameters():
            if p.numel() and p.layout is torch.strided:
                place = (name, p.data_ptr(), p.data_ptr() + p.nbytes)
                self.places.setdefault(p.untyped_storage().data_ptr(), []).append(place)
        self.model.train(mode == "train")
        for module in self.modules:
            if isinstance(module, nn.modules.dropout._DropoutNd) and not isinstance(module, ALPHA):
                module.eval()  # as an identity: what it drops has nothing to do with channels
        hooks = (
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave),
        )
        try:
            with torch.no_grad(), WholeDropout(), WholeFunctions(self), self:
                output = self.model(*args, **kwargs)
        except Exception as error:
            if rule := _of_a_rule(error):
                raise RuntimeError(
                    f"the trace itself failed, with {type(error).__name__} in {rule}: {error}. This is a defect in the "
                    f"trace: please report it with the model."
                ) from error
            given = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in inputs)
            raise ValueError(
                f"the model raised {type(error).__name__} in {mode} mode on the example input ({given}): {error}. "
                f"Give an example that model(example_input) accepts in train and in eval mode: the right shape, "
                f"dtype and device."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        for name, parameter in self.model.named_parameters():
            if before.get(name) != (parameter.data_ptr(), parameter._version):
                self.fixed.add(name)  # forward changes it itself, which it could not under a gate
        self._fix_outputs(output, mode)

    def _fix_written(self, call: Call) -> None:
        """Keep parameters that a forward pass writes to, through ``.data`` too, which leaves no other trace: under a
        gate it would write to the product of the two.
        """
        for tensor in call.written:
            start = tensor.data_ptr()
            for name, first, last in self.places.get(tensor.untyped_storage().data_ptr(), ()):
                if first < start + max(tensor.nbytes, 1) and start < last:
                    self.fixed.add(name)

    def _fix_outputs(self, output: Any, mode: str) -> None:
        tensors = tensors_in(output).values()
        if mode == "eval" and not any(has_values(tensor) for tensor in tensors):
            raise ValueError(nothing_to_compare(output))
        for tensor in tensors:
            if has_values(tensor) and not tensor.isfinite().all():
                raise ValueError(
                    f"the model's output on the example input is not finite in {mode} mode; give an example with "
                    f"finite values and a model that has not diverged."
                )
            self.consume(tensor)
            if (codes := self.codes.get(tensor)) is not None:
                self.outputs.append(labels_in(codes).unique())

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)
        self.within, self.arguments = (self.rule_within(module) if args else None), args

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # a result would replace the module's output
        self.stack.pop()
        self.within, self.arguments = None, ()
        self.ran.add(module)
        if module in self.watched:
            # the codes as they are: this runs inside the mode, and what it computed would count as the network's work
            found = (self.codes.get(tensor) for tensor in tensors_in(output).values())
            self.watched[module] += [codes for codes in found if codes is not None]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.counting:
            self.liveness.before()
        name = func._schema.name.split("::")[-1]
        given, args = args, with_a_row(name, args)
        chance = torch.Tag.nondeterministic_seeded in func.tags
        out = steady(func, args, kwargs) if chance else func(*args, **kwargs)
        call = Call(func, name, args, kwargs, found_one(name, args, out))
        out = call.out
        tensors, outputs = call.tensors, call.outputs
        if not ("batch_norm" in call.name or "dropout" in call.name or not any(map(has_values, outputs))):
            self.operators[self.mode][call.name] += 1
        if func._schema.is_mutable:
            self._fix_written(call)
        self.reached.update(id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter))
        self.shapes.update(tuple(tensor.shape) for tensor in outputs)
        rule = self.rule_of(func, call.name)
        # what is written to in place may be looked at through other tensors, which would not know of the new needs
        hands_on = not self.within and hasattr(rule, "hands_on") and (len(tensors) == 1 or not func._schema.is_mutable)
        if not hands_on:
            normalised = args[0] if "batch_norm" in call.name or call.name == "native_group_norm" else None
            normalised = self.arguments[0] if self.within else normalised
            for tensor in tensors:
                if tensor is not normalised:
                    self.consume(tensor)
        if any(tensor in self.fed for tensor in tensors):
            self.fed.update(dict.fromkeys(outputs, True))
        if picks(call._replace(args=given), self.fed, self.picked):
            self.picked.update(dict.fromkeys(outputs, True))
        counted = len(self.calls), self.constant_macs
        self.spared: list[Tensor] = []
        if self.within:
            self.within(self, self.arguments, outputs)
        else:
            rule(self, call)
        if hands_on:
            self._hand_on(tensors, outputs)
        if counted != (len(self.calls), self.constant_macs) and any(tensor in self.picked for tensor in tensors):
            self.routed.setdefault(self.here)
        if self.counting:
            coded = ((tensor, self.codes.get(tensor)) for tensor in outputs)
            self.liveness.after(call.name, tensors, coded)
        return out

    # What rules read and write

    @property
    def module(self) -> nn.Module | None:
        """The innermost module that is running."""
        return self.stack[-1] if self.stack else None

    @property
    def here(self) -> str:
        """Its name."""
        return self.modules.get(self.module, type(self.module).__name__) if self.stack else ""

    def of(self, tensor: Any) -> Tensor | None:
        """Return a tensor's codes, or None if it holds no channels."""
        if not isinstance(tensor, Tensor):
            return None
        codes = self.codes.get(tensor)
        name = self.names.get(tensor) if codes is None else None
        if name is None or tensor.numel() <= 1:
            return codes
        if tensor.numel() > LARGE:
            self.fixed.add(name)
            return None
        if name not in self.entries:
            self.entries[name] = self.fresh(tensor.numel()).view(tensor.shape)
        return (self.entries[name] << 1) | 1  # non-zero, however closed the channel

    def parameter(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or whose entries it holds."""
        return (
            self.names[tensor] if isinstance(tensor, nn.Parameter) and tensor in self.names else self.moved.get(tensor)
        )

    def set(self, tensor: Tensor, codes: Tensor | None) -> None:
        """Give a new activation its codes."""
        if codes is None or tensor in self.names:
            return
        self.codes[tensor] = codes = compact(codes)
        self.seen.append(codes)
        if tensor.numel():
            self.storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(tensor))

    def change(self, tensor: Tensor, codes: Tensor | None, operator: str) -> None:
        """Give a tensor that was changed in place its new codes; what else looks at its memory is frozen."""
        old = self.codes.get(tensor)
        if codes is None or (old is not None and old.shape == codes.shape and torch.equal(old, codes)):
            return
        others = [reference() for reference in self.storages.get(tensor.untyped_storage().data_ptr(), ())]
        seen = [self.codes[other] for other in others if other is not None and other is not tensor]
        if seen or tensor._is_view():
            for each in (*seen, codes):
                self.freeze(labels_in(each), operator)
        self.set(tensor, codes)

    def fresh(self, count: int) -> Tensor:
        """Return ``count`` new labels."""
        self.labels += count
        return torch.arange(self.labels - count, self.labels)

    def tie(self, a: Tensor, b: Tensor, within: str = "") -> None:
        """Tie label tensors entry by entry, with broadcasting; label 0 ties with nothing. ``within`` says what it is
        that ties channels of one tensor to one another.
        """
        a, b = (each.reshape(-1) for each in torch.broadcast_tensors(a, b))
        apart = (a != b) & (a != 0) & (b != 0)
        if apart.any():
            pairs = (a[apart] << 32 | b[apart]).unique()  # one number a pair: sorting rows is ten times slower
            self.ties.append(torch.stack([pairs >> 32, pairs & 0xFFFFFFFF], 1))
            if within:
                self.bundles.append((within, self.here, self.ties[-1].flatten()))

    def tie_positions(self, a: Tensor, b: Tensor, attribute: str = "", within: str = "") -> None:
        """Tie positions that must stay or go together; where one side is fixed, the other is frozen: on account of a
        plain tensor of a module, if ``attribute`` names one.
        """
        a, b = torch.broadcast_tensors(a, b)
        self.tie(a, b, within)
        for side, fixed in ((a, b == 0), (b, a == 0)):
            self.freeze(side[fixed], attribute, kind="attribute" if attribute else "tied")

    def freeze(self, labels: Tensor, what: str = "", where: str | None = None, kind: str = "unknown") -> None:
        """Freeze labels, and remember why: a ``kind`` of cause, ``what`` (an operator, say) and ``where`` (a module; by
        default the one that is running).
        """
        labels = labels.unique()
        labels = labels[labels > 0]
        if len(labels):
            self.frozen.append(labels)
            self.causes.append((kind, what, self.here if where is None else where, labels))

    def register(self, name: str, dim: int, labels: Tensor) -> None:
        """Let a parameter's dimension follow labels (0: fixed); the uses of one parameter are tied."""
        if (known := self.dims.get((name, dim))) is not None:
            self.tie_positions(known, labels)
            labels = torch.maximum(known, labels)
        self.dims[name, dim] = labels

    def channelwise(self, tensor: Tensor, dim: int, operator: str) -> Tensor:
        """Return one code per channel (int64 ``[tensor.shape[dim]]``); what differs within a channel is tied."""
        size, codes = tensor.shape[dim], self.of(tensor)
        if codes is None:
            return torch.ones(size, dtype=torch.int64)
        moved = codes.movedim(dim, 0)
        if not any(varies(moved, d) for d in range(1, moved.ndim)):
            return moved.reshape(size, -1)[:, 0]
        if varies(moved, 1):
            self.freeze(labels_in(codes), operator)  # channels along the batch
        flat = moved.reshape(size, -1)
        best = flat.amax(1)
        self.tie(flat >> 1, (best >> 1)[:, None], operator)
        return (best & ~1) | (flat & 1).amax(1)

    def unknown(self, call: Call, kind: str = "unknown", what: str = "") -> None:
        """Freeze every channel that enters an operator, and keep every parameter in it whole; the cause is the operator
        unless another is given.
        """
        for tensor in call.tensors:
            self.keep(tensor, what or call.name, kind)
        if self.counting:
            # Products of activations, as in attention: their size does not change, so they are a fixed cost.
            macs = constant_macs(call)
            self.constant_macs += macs or 0
            if macs is None and self.rule_of(call.func, call.name) is Identities.unknown and self.multiplied(call):
                self.uncounted.setdefault(call.name, self.here)

    def keep(self, tensor: Tensor, what: str, kind: str = "unknown") -> None:
        """Freeze the channels of a tensor that enters something, and a parameter that it is."""
        for name in (self.names.get(tensor), self.transposed.get(tensor, (None,))[0]):
            if name is not None:
                self.fixed.add(name)
        if (codes := self.codes.get(tensor)) is not None:
            self.freeze(labels_in(codes), what, kind=kind)

    def multiplied(self, call: Call) -> bool:
        """Say whether an operator may well multiply what a sample makes by a matrix that is a parameter."""
        shapes = [
            self.parameters[name].shape for each in call.tensors if (name := self.parameter(each)) in self.parameters
        ]
        matrix = any(sum(size > 1 for size in shape) > 1 for shape in shapes)
        return matrix and any(each in self.fed and has_values(each) for each in call.tensors)

    def consume(self, tensor: Tensor) -> None:
        """An activation is used where a closed channel must be zero: what it needs for that is gated."""
        for (name, dim, _), gate in self.needs.get(tensor, {}).items():
            if gate is None:
                self.added.add(name)
            else:
                self.keep_gate(self.raw, (name, dim), gate)

    def need(self, tensor: Tensor, name: str, dim: int | None = None, gate: Gate | None = None) -> None:
        """Say what an activation needs: a gate on the weight ``name``, or, without one, on the bias of that name."""
        self.needs[tensor] = {(name, dim, gate and gate.bias): gate}

    def spare(self, tensor: Tensor) -> None:
        """Say that the result of the operator that runs is zero where it must be, whatever this operand is."""
        self.spared.append(tensor)

    def _hand_on(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Let the results need what the operands did, but for those that were spared."""
        relied = [tensor for tensor in tensors if not any(tensor is each for each in self.spared)]
        needs = {key: gate for tensor in relied for key, gate in self.needs.get(tensor, {}).items()}
        for tensor in outputs:
            self.needs[tensor] = needs

    def keep_gate(self, gates: dict, place: Any, gate: Gate) -> None:
        """Remember where a gate acts; further biases that a weight is used with have gates of their own."""
        known = gates.get(place)
        if known is None or known.bias is None:
            gates[place] = gate
        elif gate.bias not in (None, known.bias):
            self.added.add(gate.bias)


def _of_a_rule(error: Exception) -> str:
    """Return which function of the trace raised an error; "" if it was the model, or an operator that it called."""
    *_, name = (each.name for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).parent == HERE)
    return "" if name in ("run", "__torch_dispatch__", "__torch_function__") else name  # which call the model and torch
