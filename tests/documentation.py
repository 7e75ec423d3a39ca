"""What tests read of the documentation: pages, links, headings, and blocks of code to execute."""

import ast
import importlib.util
import re
from pathlib import Path

import torch
from torch.nn import functional as F

import tcp_core as tcp
from tcp_core import nets
from tcp_core.datasets import sources

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

_FENCE = re.compile(r"(?:<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name):
    """Return (code, note) of each block of Python of a page; the note is the comment on the line before it, or ""."""
    found = [match for match in _FENCE.finditer(read(name)) if match["language"] == "python"]
    return [(match["code"], match["note"] or "") for match in found]


def prose(name):
    """Return a page without its blocks and spans of code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", read(name)))


def anchors(name):
    """Return the anchors that GitHub gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", read(name)), re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


def links(name):
    """Return the targets of all links and images of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(name))


def digits(widths=(8, 16, 32)):
    """Return the names that blocks of code take for granted: a small network on digits, as a user may have it."""
    data = sources.digits()
    train = data.train.split(640)[1]
    torch.manual_seed(0)
    loader = [batch for epoch in range(5) for batch in train.batches(32, shuffle=True, epoch=epoch)]

    def build_dense_model():
        return nets.small_resnet(widths=widths, blocks=1, num_classes=10, in_channels=1)

    model = build_dense_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = {"tcp": tcp, "torch": torch, "model": model, "optimizer": optimizer, "build_dense_model": build_dense_model}
    given |= {"loader": loader, "epochs": 1, "loss_fn": F.cross_entropy, "images": data.train.pixels[:2].float()}
    return given | {"train": loader, "val": data.val}


def execute(name, given, after=lambda code, given: None):
    """Execute the blocks of a page one after the other; one with a note "not run: why" is only compiled.

    One with "needs: packages" is executed where they are installed. `after` is called after each with its code.
    """
    for code, note in blocks(name):
        ast.parse(code)
        needs = note.removeprefix("needs:").split() if note.startswith("needs:") else []
        if note.startswith("not run:") or not all(map(importlib.util.find_spec, needs)):
            continue
        exec(compile(code, name, "exec"), given)
        after(code, given)
