"""What does not go together in the parameters of a run.

A declaration asks before anything runs, the run notebook in its first cell: what a method ignores would otherwise stand
in `params.json`, and in the tables, as if it had been used.
"""

from collections.abc import Iterator, Mapping

from .comparators import METHODS
from .declaration import BUDGETS


def of(values: Mapping) -> Iterator[str]:
    """Yield each contradiction in a run's parameters, by name; one that a notebook does not have is not asked about."""
    method, network = values.get("method"), values.get("network", "")
    if {"method", *BUDGETS} <= values.keys():
        budget = {name: values[name] for name in BUDGETS if values[name]}
        if (method == "dense") == bool(budget):
            yield (
                f"method {method} with {budget or 'no budget'} given; dense takes no macs and params, every other "
                "method one of them or both"
            )
    yield from _places_in_the_run(method, values)
    if values.get("workers") == 0 and values.get("skip_corrupt"):
        yield "skip_corrupt=True and workers=0 given; images held in memory must all be readable, or give workers"
    if values.get("sync_batch_norm") and values.get("processes") == 1:
        yield "sync_batch_norm=True and processes=1 given; one process has nothing to synchronise with"
    if values.get("widths_of") and method != "small":
        yield f"widths_of and method {method} given; only small takes the widths of another run"
    if values.get("widths_of") and values.get("weights"):
        yield "widths_of and weights given; a network with the widths of another run starts with fresh weights"
    if values.get("weights") == "published" and not network.startswith("imagenet_"):
        yield f"weights: there are none published for {network}, but for the networks imagenet_*"


def _places_in_the_run(method: str | None, values: Mapping) -> Iterator[str]:
    """Yield what is wrong with when the network is made smaller."""
    start, end = (values.get(name, 0) for name in ("phase_start", "phase_end"))
    if (start or end) and method != "tailored":
        yield (
            f"phase_start={start} and phase_end={end} with method {method} given; only tailored has a phase, so leave "
            "them out"
        )
    elif start and not end:
        yield (
            f"phase_start={start} given without phase_end, and without an end the phase is found by itself; give both, "
            "or leave phase_start out"
        )
    elif end and end <= start:
        yield f"phase_start={start} and phase_end={end} given; the end must be larger than the start"
    if values.get("prune_at") and method not in METHODS:
        yield (
            f"prune_at={values['prune_at']} with method {method} given; only comparators prune after a share of the "
            "run, so leave it out"
        )
    elif values.get("restart") and method not in (None, *METHODS):
        yield (
            f"restart=True with method {method} given; the learning rate's schedule starts anew when a comparator "
            "prunes during the run, so leave it out"
        )
    elif values.get("restart") and values.get("prune_at") == 0:
        yield (
            "restart=True given without prune_at; the learning rate's schedule starts anew when a comparator prunes "
            "during the run, so give prune_at above 0, or leave restart out"
        )
