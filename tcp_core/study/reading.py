"""From a YAML file, which names a notebook, fixed values and grids, to a :class:`Declaration`.

`read` refuses whatever is wrong, all at once and before anything runs; docs/experiments.md describes the format.
"""

import ast
import difflib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import nbformat
import torch
import yaml

from .. import foreign, nets
from ..controller import Controller
from ..datasets import images
from ..tracing import trace
from ..training import batches, evaluation
from . import comparators, contradictions, places
from .declaration import BUDGETS, NETWORK, PLACES, STARTS, Declaration, DeclarationError, Run, path_of, project_of

ALLOWED = {
    "method": ("tailored", "dense", *comparators.METHODS),
    "precision": tuple(evaluation.PRECISIONS),
    "augment": images.AUGMENTATIONS,
    "mixing": tuple(batches.MIXING),
}
RANGES = {
    **dict.fromkeys(("macs", "params", "phase_end"), ("in [0, 1]", lambda value: 0 <= value <= 1)),
    **dict.fromkeys(
        ("warmup", "label_smoothing", "prune_at", "phase_start"), ("in [0, 1)", lambda value: 0 <= value < 1)
    ),
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "processes"), ("at least 1", lambda value: value >= 1)),
    **dict.fromkeys(
        ("lr", "weight_decay", "size", "val_images", "seed", "threads", "workers", "checkpoint_every", "multiple"),
        ("at least 0", lambda value: 0 <= value < math.inf),
    ),
}
STEP = ("batch_size", "accumulate", "processes")  # so many images times each other are one step
ROOT = "IMAGENET_ROOT"  # environment variable


def read(
    path: str | Path,
    *,
    data: str | Path | None = None,
    weights: str | Path | None = None,
    runs: str | Path | None = None,
    places: bool = True,
    budgets: bool = True,
) -> Declaration:
    """Return the runs that a YAML file, or experiments/<name>.yaml, declares.

    Args:
        path: the file, or its name.
        data: where the declared images lie on this machine; if None, for ImageNet, what IMAGENET_ROOT says.
        weights: folder of the weights declared as "file:...".
        runs: folder of all results, build/runs if None.
        places: False to list runs for which data or weights are not at hand; `missing` then says what is not.
        budgets: False to leave out what takes seconds: comparing budgets with the networks' floors, and files of
            weights with the networks.

    Raises:
        DeclarationError: with all problems, each with file, key, what was given and what is allowed.
    """
    return _Reader(path, data, weights, runs).declaration(places, budgets)


class _Reader:
    """Reads one file and collects all that is wrong with it."""

    def __init__(self, path, data, weights, runs):
        self.path = path_of(path)
        project = project_of(self.path)
        self.folder = Path(runs).expanduser().absolute() if runs else project / "build" / "runs"
        self.source, self.images = "DATA", Path(data).expanduser().absolute() if data else None
        self.weights = Path(weights).expanduser().absolute() if weights else None
        self.problems: dict[str, list[str]] = {}  # the keys that have each
        self.skipped: dict[str, str] = {}

    def say(self, key: str, text: str) -> None:
        self.problems.setdefault(text, []).append(str(key))

    def stop(self) -> None:
        if self.problems:
            more = {text: f" and {len(keys) - 3} more" * (len(keys) > 3) for text, keys in self.problems.items()}
            named = {text: ", ".join(keys[:3]) + more[text] for text, keys in self.problems.items()}
            raise DeclarationError([f"{self.path.name}: {keys}: {text}" for text, keys in named.items()])

    def declaration(self, places: bool, budgets: bool) -> Declaration:
        content = self.load()
        self.data = content["data"]
        if self.data == "imagenet" and not self.images and os.environ.get(ROOT):
            self.source, self.images = ROOT, Path(os.environ[ROOT]).expanduser().absolute()
        self.notebook = project_of(self.path) / "notebooks" / f"{content['notebook']}.ipynb"
        self.defaults = self.parameters()
        fixed = self.values("fixed", content.get("fixed", {}))
        runs: dict[str, Run] = {}
        for name, body in content["experiments"].items():
            for run in self.experiment(name, body, fixed):
                if run.key in runs:
                    self.say(
                        run.key,
                        "two runs have this key; values of a grid are part of it if written as a list, such as [0]",
                    )
                runs[run.key] = run
        self.stop()
        for run in runs.values():
            self.check(run, runs)
        self.stop()
        declaration = Declaration(self.path, self.notebook, self.data, self.images, runs, [], self.skipped)
        todo = declaration.todo()
        declaration.missing.extend(self.missing(todo))
        for text in declaration.missing if places else ():
            self.say(*text.split(": ", 1))
        if budgets:
            self.check_networks(todo)
        self.stop()
        return declaration

    def load(self) -> dict:
        """Return the file's content, its outermost level checked."""
        if not self.path.is_file():
            there = ", ".join(sorted(path.stem for path in self.path.parent.glob("*.yaml"))) or "none"
            text = f"there is no {self.path}; declarations in this folder: {there}"
            if not self.path.parent.is_dir():
                text += "; a clone of the repository has declarations and notebooks, the installed package has none"
            raise DeclarationError([text])
        try:
            content = yaml.load(self.path.read_text(encoding="utf-8"), Loader=_Loader)
        except yaml.YAMLError as error:
            raise DeclarationError([f"{self.path} is not valid YAML: {error}"]) from None
        except UnicodeDecodeError as error:
            raise DeclarationError([f"{self.path} is not a text in UTF-8 ({error}); save it as one"]) from None
        types = {"data": str, "notebook": str, "experiments": dict, "fixed": dict}
        content = content if isinstance(content, dict) else {}
        for key in content.keys() - types.keys():
            self.say(key, f"unknown key{_nearest(key, types)}; allowed are {', '.join(types)}")
        unusable = False  # an unknown key keeps nothing from being read, and is told with what is found there
        for key, kind in types.items():
            if key in content or key != "fixed":
                given = content.get(key)
                if not isinstance(given, kind) or not (given or key == "fixed"):
                    self.say(key, f"{given!r} given; a {'mapping' if kind is dict else 'text'} is needed")
                    unusable = True
        if unusable:
            self.stop()
        return content

    def parameters(self) -> dict:
        """Return the notebook's parameters and their defaults, in the notebook's order."""
        if not self.notebook.exists():
            there = sorted(path.stem for path in self.notebook.parent.glob("*.ipynb"))
            near = _nearest(self.notebook.stem, there)
            self.say("notebook", f"there is no {self.notebook}{near}; in its folder: {', '.join(there)}")
            self.stop()
        cells = nbformat.read(self.notebook, as_version=4).cells
        source = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
        lines = ast.parse(source[0] if source else "").body
        found = {line.target.id: ast.literal_eval(line.value) for line in lines if isinstance(line, ast.AnnAssign)}
        for name in PLACES.keys() - found.keys():
            self.say("notebook", f"{self.notebook} lacks the parameter {name!r}, which every run is given")
        return found

    def values(self, where: str, given, *, lists: bool = False) -> dict:
        """Return a mapping of parameters to values, or to lists of them, with what is wrong in it left out."""
        if not isinstance(given, Mapping):
            self.say(where, f"{given!r} given; a mapping of parameters to {'lists of ' * lists}values is needed")
            return {}
        found = {}
        for name, entry in given.items():
            key = f"{where}.{name}"
            entries = entry if isinstance(entry, list) and lists else [entry]
            if name in PLACES:
                self.say(key, f"{entry!r} given; this is set by {PLACES[name]}")
            elif name not in self.defaults:
                known = [name for name in self.defaults if name not in PLACES]
                self.say(key, f"unknown parameter{_nearest(name, known)}; {self.notebook.stem} has {', '.join(known)}")
            elif not entries:
                self.say(key, "an empty list makes no run; give at least one value")
            elif all(list(map(partial(self.is_right, key, name), entries))):
                entries = [type(self.defaults[name])(value) for value in entries]  # an int may stand for a float
                found[name] = entries if lists else entries[0]
        return found

    def is_right(self, key: str, name: str, value) -> bool:
        """Say whether a parameter may have this value; if not, the reason is a problem."""
        kind, allowed = type(self.defaults[name]), None
        if type(value) is not kind and (kind, type(value)) != (float, int):
            allowed = f"of type {kind.__name__}"
            if kind is float and re.fullmatch(r"[\d.]+e-?\d+", str(value)):
                allowed += "; YAML takes 5e-4 for text, so write 5.0e-4 or 0.0005"
        elif name == "network" and value not in nets.NETWORKS:
            allowed = _network_fault(value)
        elif name in ALLOWED and value not in ALLOWED[name]:
            allowed = f"one of {', '.join(ALLOWED[name])}{_nearest(value, ALLOWED[name])}"
        elif name in RANGES and not RANGES[name][1](value):
            allowed = RANGES[name][0]
        elif name == "weights" and value not in ("", "published") and not value.startswith(("file:", "run:")):
            allowed = '"" (from scratch), "published", "file:<name in the folder WEIGHTS=...>" or "run:<key of a run>"'
        elif name == "widths_of" and value and not value.startswith("run:"):
            allowed = '"" (widths of its own) or "run:<key of a run>"'
        if allowed:
            self.say(key, f"{value!r} given; it must be {allowed}")
        return allowed is None

    def experiment(self, name: str, body, fixed: dict) -> Iterator[Run]:
        """Yield the runs of one experiment."""
        where = f"experiments.{name}"
        if not re.fullmatch(r"[\w.+-]+", str(name), re.ASCII) or not str(name).strip("."):
            self.say(where, "an experiment's name is a folder's; use letters, digits and . _ + - only, not dots alone")
        if not isinstance(body, dict) or not body or body.keys() - {"fixed", "grid"}:
            self.say(where, f"{body!r} given; a mapping with fixed, grid or both, and no other key, is needed")
            return
        own = self.values(f"{where}.fixed", body.get("fixed", {}))
        grid = body.get("grid", {})
        if grid == []:
            self.say(f"{where}.grid", "an empty list makes no run; give at least one mapping, or leave grid out")
        for number, product in enumerate(grid if isinstance(grid, list) else [grid]):
            place = f"{where}.grid[{number}]" if isinstance(grid, list) else f"{where}.grid"
            axes = self.values(place, product, lists=True)
            for both in axes.keys() & own.keys():
                self.say(f"{place}.{both}", f"stands in {where}.fixed too; remove one of them")
            # a budget that is not declared is none, whatever the notebook's default
            base = {budget: 0.0 for budget in BUDGETS if budget in self.defaults} | fixed | own
            named = {axis for axis in axes if isinstance(product[axis], list) or axis in ("network", "method")}
            for values in itertools.product(*axes.values()):
                yield self.run(name, base | dict(zip(axes, values, strict=True)), named - {*STARTS})

    def run(self, experiment: str, declared: dict, named: set) -> Run:
        # in the notebook's order, so that a key does not depend on the order within the YAML file
        parts = [_part(name, declared[name]) for name in self.defaults if name in named]
        key = f"{experiment}/{'-'.join(filter(None, parts)) or 'run'}"
        if not re.fullmatch(r"[\w.+/-]+", key, re.ASCII) or key.count("/") > 1:
            self.say(key, "values of a grid name the run's folder; use letters, digits and . _ + - in them only")
        values = self.defaults | declared
        for name in STARTS:
            if start := declared.get(name):
                try:
                    declared[name] = values[name] = start.format(**values)
                except (KeyError, IndexError, ValueError) as error:
                    self.say(key, f"{name} {start!r}: {error} cannot be filled in; in braces stand names of parameters")
        kind, _, place = declared.get("weights", "").partition(":")
        folder = self.folder / self.path.stem
        params = declared | {"out": str(folder / key)}
        params["data"] = self.data if self.data == "digits" else str(self.images or self.data)
        declared["data"] = self.data
        if kind == "file":
            params["weights"] = str((self.weights or Path("WEIGHTS")) / place)
        elif kind == "run":
            params["weights"] = str(folder / place / NETWORK)
        needs = place if kind == "run" else None
        if of := declared.get("widths_of", "").removeprefix("run:"):
            params["widths_of"], needs = str(folder / of), of
        return Run(key, declared, values, params, folder / key, needs)

    def check(self, run: Run, runs: dict[str, Run]) -> None:
        """Collect what is wrong with a run beside its single values."""
        for text in (*contradictions.of(run.values), *self.of_the_data(run.values)):
            self.say(run.key, text)
        name = "widths_of" if run.declared.get("widths_of") else "weights"
        start, seen = run, set()
        while start.needs and start.needs in runs and start.key not in seen:
            seen.add(start.key)
            start = runs[start.needs]
        if start.key in seen:
            self.say(run.key, f"{name}: 'run:{run.needs}' leads in a circle")
        elif run.needs and run.needs not in runs:
            self.say(run.key, f"{name}: there is no run {run.needs!r}{_nearest(run.needs, runs)}")
        elif name == "widths_of":
            other = runs[run.needs]
            if any(other.values.get(each) != run.values.get(each) for each in ("network", *BUDGETS)):
                own = f"one of {run.values.get('network')} with {run.budget() or 'no budget'} is needed"
                given = f"{other.values.get('network')} with {other.budget() or 'no budget'}"
                self.say(run.key, f"widths_of: 'run:{run.needs}' is of {given}; {own}")
        elif run.needs:
            network, method = (runs[run.needs].values.get(name) for name in ("network", "method"))
            if network != run.values.get("network") or method not in ("dense", None):
                own = f"a dense {run.values.get('network')} is needed"
                self.say(run.key, f"weights: 'run:{run.needs}' gives a {method} {network}; {own}")
            there, here = (each.values.get("val_images", 0) for each in (runs[run.needs], run))
            if there < here and self.data != "digits":
                self.say(
                    run.key,
                    f"weights: 'run:{run.needs}' has val_images={there}, so it trains on images that this run, with "
                    f"{here}, chooses by; give that one {here} or more",
                )
        if run.is_done():
            for text in run.disagreements():
                self.say(run.key, text)
        elif run.values.get("method") in comparators.METHODS:
            try:
                options = {"at": run.values.get("prune_at", 0.0), "multiple": run.values.get("multiple", 1) or "auto"}
                comparators.pruner(run.values["method"], run.budget(), **options)
            except ValueError as error:
                self.say(run.key, str(error))
            except ImportError as error:  # an outside peer is optional
                self.skipped[run.key] = str(error)

    def of_the_data(self, values: dict) -> Iterator[str]:
        """Yield what in a run's values does not go together with the data."""
        workers = values.get("workers")
        if workers and self.data in ("digits", "cifar10"):
            yield f"workers={workers} given, which decode the images of a folder; {self.data} needs 0"
        elif workers and not values.get("size") and self.data not in places.KNOWN:
            yield f"workers={workers} and size=0 given; images that are decoded while training need a size, such as 224"
        if workers == 0 and self.data == "imagenet":
            yield "workers=0 given, which holds all images in memory; imagenet needs at least 1"
        if values.get("size") and self.data in ("digits", "cifar10"):
            yield f"size={values['size']} given, to which the images of a folder are resized; {self.data} needs 0"
        images = places.KNOWN.get(self.data, places.Facts()).images  # those of a folder are counted as it is read
        if images is None:
            return
        # digits have a validation part of their own
        held_out = 0 if self.data == "digits" else values.get("val_images", 0)
        if held_out >= images:
            yield f"val_images={held_out} given, which leaves none of the {images} images of {self.data} to train on"
        elif math.prod(times := [values.get(name, 1) for name in STEP]) > images - held_out:
            taken = " times ".join(f"{name}={value}" for name, value in zip(STEP, times, strict=True) if value > 1)
            yield f"{taken} given, which is more than the {images - held_out} images there are to train on"
        if held_out == 0 and self.data == "cifar10":
            yield "val_images=0 given, which leaves no images to choose by; cifar10 has no validation part of its own"

    def missing(self, todo: dict[str, Run]) -> list[str]:
        """Return what is not at hand for the runs to do; a place that was given and is wrong is a problem."""
        found = []
        if self.images and (wrong := places.fault(self.data, self.images)):
            self.say("data", f"{self.source}={self.images} given; {wrong}")
        elif not self.images and todo and self.data != "digits":
            other = f" or the environment variable {ROOT}" if self.data == "imagenet" else ""
            found.append(f"data: {self.data} is needed; say where it lies with DATA=/path/to/{self.data}{other}")
        starts = (run for run in todo.values() if run.declared.get("weights", "").startswith("file:"))
        files = sorted({run.params["weights"] for run in starts})
        hint = "" if self.weights else "; say where it lies with WEIGHTS=/path/to/folder"
        return [*found, *(f"weights: there is no {file}{hint}" for file in files if not Path(file).is_file())]

    def check_networks(self, todo: dict[str, Run]) -> None:
        """Compare weights with the network, and each budget with the smallest there can be, as the controller does."""
        try:
            shape, classes, _ = places.facts(self.data, self.images)
        except ValueError as error:
            return self.say("data", f"{self.source}={self.images} given; {error}")
        traced, seen = {}, set()
        for run in todo.values() if shape else ():
            network, size, budget = run.values.get("network"), run.values.get("size"), run.budget()
            multiple = run.values.get("multiple") or 1
            start = (network, None if run.needs else run.params.get("weights"))
            case = (network, size, multiple, *budget.items())
            try:
                if network and start not in seen:
                    seen.add(start)
                    self.check_weights(start[1], network, shape[0], classes)
                if network and budget and case not in seen:
                    seen.add(case)
                    if (network, size) not in traced:
                        model = nets.build(network, num_classes=classes, in_channels=shape[0])
                        example = torch.zeros(2, shape[0], *((size, size) if size else shape[1:]))
                        traced[network, size] = trace(model, example)
                    Controller(traced[network, size], budget, steps=10**6, multiple=multiple)
            except (
                ValueError,
                TypeError,
            ) as error:  # a budget below the floor, images that the network is not made for, ...
                self.say(run.key, str(error))

    def check_weights(self, weights: str | None, network: str, channels: int, classes: int) -> None:
        """Raise ValueError if these weights, which are not downloaded, do not fit the network with so many classes."""
        if weights == "published" and classes != 1000:
            raise ValueError(f"weights: the published ones know 1,000 classes, and {self.data} has {classes:,}")
        if weights and Path(weights).is_file():
            nets.load_weights(nets.build(network, num_classes=classes, in_channels=channels), weights, name=network)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; the second would replace the first without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _network_fault(name: str) -> str | None:
    """Say what a network's name must be, None if it is one of somebody else's that is at hand."""
    if ":" not in name:
        known = sorted(nets.NETWORKS)
        return f"one of {', '.join(known)}{_nearest(name, known)}; or {foreign.FORMS}"
    try:
        foreign.builder(name)
    except (ValueError, ImportError) as error:
        return f"a network that is at hand: {error}"
    return None


def _nearest(given, known) -> str:
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _part(name: str, value) -> str:
    """Return a value's part of the key; a budget of 0 is none and has none."""
    if isinstance(value, str):
        return value.replace(":", "-")
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return "" if name in BUDGETS and not value else f"{name}{value:.10g}"
