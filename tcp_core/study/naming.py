"""Names of marks in figures, written where the marks stand: they must cover no curve and no other name."""

import itertools

import numpy as np
from scipy.optimize import isotonic_regression

SIDES = np.array([-1, 1])
LEADER = {"arrowstyle": "-", "color": "#8A8A8A", "lw": 0.7, "linestyle": (0, (1, 2)), "shrinkA": 1, "shrinkB": 4}
"""From a name to its point: grey and dotted, so that it cannot be taken for a curve that goes on."""


def name_right(axes, labels):
    """Write each (x, y, text, color, weight) right of the axes, apart from the others, with a line to its point.

    The points are the last ones on the axis: lines from others would cross what stands further right.
    """
    if not labels:
        return
    axes.figure.draw_without_rendering()  # the layout must stand before heights can be told
    low, high = axes.get_ylim()
    gap = 12.5 / (axes.get_window_extent().height * 72 / axes.figure.dpi) * (high - low)
    labels = sorted(labels, key=lambda label: label[1])
    ranks = gap * np.arange(len(labels))
    heights = isotonic_regression([label[1] for label in labels] - ranks).x + ranks  # moved as little as need be
    for height, (x, y, text, color, weight) in zip(heights, labels, strict=True):
        axes.annotate(
            text, (x, y), (1.03, height), textcoords=("axes fraction", "data"), va="center", color=color,
            fontsize=9, weight=weight, arrowprops=LEADER,
        )  # fmt: skip


def name_inside(axes, labels):
    """Write each (x, y, text, color, weight) near its point within the axes, where it covers no curve and no name."""
    labels = [label for label in labels if np.isfinite(label[1])]  # a run may not have read the test images
    if not labels:
        return
    axes.figure.draw_without_rendering()  # as above
    names = [name.get_window_extent() for name in axes.texts]
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    lines += [
        axes.transData.transform(path.vertices) for bars in axes.collections for path in bars.get_paths()
    ]  # of the standard deviations
    pieces = [np.linspace(*ends, 100) for line in lines for ends in itertools.pairwise(line)]
    taken = np.concatenate([*lines, *pieces, *(_grid(name.x0, name.x1, name.y0, name.y1) for name in names)])
    edge, point = axes.get_window_extent(), axes.figure.dpi / 72
    for x, y, text, color, weight in labels:
        at = axes.transData.transform((x, y))
        name = axes.text(x, y, text, color=color, fontsize=9, weight=weight, ha="center", va="center")
        box = name.get_window_extent()
        half = np.array([box.width, box.height]) / 2
        away = _grid(-130, 130, -130, 130, 40) * point
        away = away[(np.abs(at + away - (edge.min + edge.max) / 2) + half <= edge.size / 2).all(axis=1)]
        covered = (np.abs(taken - at - away[:, None]) < half + 3 * point).all(axis=2).sum(axis=1)
        gap = np.maximum(np.abs(away) - half, 0)  # from the point to the name's edge
        far = np.hypot(*gap.T) + 0.05 * np.hypot(*away.T)  # of places as near, the middle one
        best = np.lexsort((far, covered))[0]
        middle = at + away[best]
        name.set_position(axes.transData.inverted().transform(middle))
        taken = np.concatenate([taken, _grid(*(middle[0] + half[0] * SIDES), *(middle[1] + half[1] * SIDES))])
        if np.hypot(*gap[best]) > 10 * point:
            start = axes.transData.inverted().transform(np.clip(at, middle - half, middle + half))
            axes.annotate("", (x, y), start, arrowprops=LEADER)


def _grid(left, right, low, high, count=5):
    """Return points over a rectangle, ``[count * count, 2]``."""
    return np.stack(np.meshgrid(np.linspace(left, right, count), np.linspace(low, high, count)), -1).reshape(-1, 2)
