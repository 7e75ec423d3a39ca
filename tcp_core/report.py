"""Where a tailoring run stands, as a dict that prints as a table."""

from __future__ import annotations

from .cost import amount


class Report(dict):
    """Where a tailoring run stands; a dict that prints as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no budget: the dense network was trained"
        rows = [
            f"{'cost':8}{'dense':>16}{'requested':>16}{'current':>16}{'of dense':>10}{'of budget':>11}{'floor':>14}"
        ]
        for name, dense in self["dense"].items():
            bound = self["bounds"].get(name)
            rows.append(
                f"{name:8}{amount(name, dense):>16}{'-' if bound is None else amount(name, bound):>16}"
                f"{amount(name, self['current'][name]):>16}"
                f"{self['current'][name] / dense:>10.2%}"
                f"{'-' if bound is None else format(self['utilisation'][name], '.2%'):>11}"
                f"{amount(name, self['floor'][name]):>14}"
            )
        if "phase" in self:  # comparators have none
            rows.append(_placed(self["phase"], self["maturity"], self["placed"], self["late"]))
        step = f"step {self['step']} of {self['steps']}"
        if self["frozen"]:  # a controller counts no further then
            state = f"frozen at {step}" if "phase" in self else f"{step}, frozen"
        else:
            state = f"{step}, strength {self['strength']:.2g}"
        few = self._few()
        rows.append(
            f"{state}; layers left with fewer than 8 channels: {len(few)}"
            + (f" ({', '.join(few[:5])}{', ...' if len(few) > 5 else ''})" if few else "")
        )
        rows += [
            f"{name} has no bound of its own and fell to {share:.1%}: give it one, or min_width as a share"
            for name, share in self._unbounded().items()
        ]
        if self.get("multiple", 1) > 1:
            rows.append(f"widths are multiples of {self['multiple']}")
        if measured := self.get("measured"):
            rows.append(
                f"latency {amount('latency', measured['latency'])} was measured, spread {measured['spread']:.1%}, as "
                f"one of {measured['networks']} networks; {measured['at']}"
            )
        return "\n".join(rows)

    def _few(self) -> list[str]:
        """Return the layers that were left with fewer than 8 channels, those that lost most first."""
        dense, widths = self["dense_widths"], self["widths"]
        few = sorted((width / dense[name], name) for name, width in widths.items() if width < 8 <= dense[name])
        return [f"{name}: {widths[name]} of {dense[name]}" for _, name in few]

    def _unbounded(self) -> dict[str, float]:
        """Return the costs without a bound that fell to less than half of the share that the bounded ones have."""
        shares = {name: self["current"][name] / max(dense, 1) for name, dense in self["dense"].items()}
        least = min(shares[name] for name in self["bounds"])
        return {name: share for name, share in shares.items() if name not in self["bounds"] and share < least / 2}


def _placed(phase: tuple[float, float], maturity: float, placed: bool, late: bool) -> str:
    """Say where the phase lies and why."""
    known = {0.0: "of a fresh network", 1.0: "of a trained network"}
    weights = known.get(maturity, f"of one {maturity:.0%} on its way to a trained network")
    place = f"phase {100 * phase[0]:.3g} to {100 * phase[1]:.3g} % of the run, "
    if not placed:
        return place + "as asked"
    began = f"the weights at the start were those {weights}"
    return f"{place}for {'branches of the network began at zero' if late else began}"


def report_of(tailor) -> Report:
    """Return the report of a :class:`tcp_core.Tailor`."""
    controller = tailor.controller
    current = controller.cost_model.exact(tailor.open_units)
    return Report(
        requested=tailor.budget.as_dict(),
        bounds=dict(controller.bounds),
        dense=dict(controller.dense),
        current=current,
        floor=dict(controller.floor),
        utilisation={name: current[name] / bound for name, bound in controller.bounds.items()},
        strength=tailor.strength,
        step=controller.step_count,
        steps=controller.steps,
        phase=controller.phase,
        maturity=controller.maturity,
        placed=controller.placed,
        late=controller.late,
        frozen=tailor.frozen,
        multiple=controller.multiple,
        measured=None if controller.measured is None else {**controller.measured, "at": tailor.measured_at},
        refused_steps=int(controller.refused),
        largest_gate_removed=tailor.largest_gate_removed,
        widths=tailor.channels.widths(tailor.open_units),
        dense_widths=tailor.channels.widths(),
        unknown=tailor.channels.unknown,
    )
