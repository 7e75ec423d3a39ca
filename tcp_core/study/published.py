"""Published results, checked and trimmed to those that our networks can stand beside.

`python -m tcp_core.study.published COLLECTED.csv results/published.csv` trims a collection of results from papers and
repositories, and writes next to it how many rows were dropped and why (`published_dropped.csv`). Every row that stays
has its citation and where its numbers were seen; nothing in it was run here.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

# Network here -> as papers call it. On CIFAR-10, "VGG-16" of about 313 M macs is the one with batch norm,
# whether or not a paper says so; the row keeps the paper's word.
ARCHITECTURES = {
    "CIFAR-10": {
        **{f"resnet{depth}": (f"ResNet-{depth}",) for depth in (20, 32, 56, 110)},
        **{"vgg16_bn": ("VGG-16-BN", "VGG-16"), "mobilenet_v2": ("MobileNetV2",)},
        **{"densenet40_12": ("DenseNet-40",), "googlenet": ("GoogLeNet",)},
    },
    "ImageNet": {
        **{f"imagenet_resnet{depth}": (f"ResNet-{depth}",) for depth in (18, 34, 50)},
        "imagenet_mobilenet_v2": ("MobileNetV2",),
    },
}
CHANGE = (-20, 1.5)  # points of accuracy between which a published change from the paper's own baseline is believed
NOT_RELIED_ON = r"low reliability|has bugs|inferred"
OTHER_KIND = r"\(dynamic\)|decomposition|not pure channel pruning|widened|wider supernet"


def trim(collected: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return the rows that compare with our networks, and the number dropped for each reason, in order of the checks.

    A row counts under the first reason that holds. Of rows with the same network, method, accuracy and FLOPs reduction
    (within half a point) the most primary, then most complete, stays.
    """
    names = {(data, name) for data, known in ARCHITECTURES.items() for names in known.values() for name in names}
    ours = [pair in names for pair in zip(collected["dataset"], collected["architecture"], strict=True)]
    reductions = collected[["flops_reduction_pct", "params_reduction_pct"]]
    change = collected["pruned_top1"] - collected["baseline_top1"]
    said = collected["method"] + " " + collected["seen_at"]
    checks = {
        "another network or data set": ~pd.Series(ours, index=collected.index),
        "no accuracy or no FLOPs reduction given": collected[["pruned_top1", "flops_reduction_pct"]].isna().any(axis=1),
        "accuracy not in (0, 100] or reduction not in [0, 100]": ~collected["pruned_top1"].between(0, 100, "right")
        | (reductions.lt(0) | reductions.gt(100)).any(axis=1),
        f"accuracy changes by less than {CHANGE[0]} or more than {CHANGE[1]} points": change.notna()
        & ~change.between(*CHANGE),
        "its source says that it is not to be relied on": said.str.contains(NOT_RELIED_ON, case=False),
        "another kind of pruning, or of a widened network": said.str.contains(OTHER_KIND, case=False),
    }
    reason = pd.Series(np.select(list(checks.values()), list(checks), ""), index=collected.index)

    kept = collected[reason == ""].assign(
        seen_at=[_readable(text) for text in collected.loc[reason == "", "seen_at"]],
        first=lambda rows: ~rows["seen_at"].str.startswith("[primary]"),
        gaps=lambda rows: rows.isna().sum(axis=1),
        about=lambda rows: rows["flops_reduction_pct"].round(),
    )
    kept = kept.sort_values(["first", "gaps"], kind="stable").drop_duplicates(
        ["dataset", "architecture", "method", "pruned_top1", "about"]
    )
    dropped = reason[reason != ""].value_counts().reindex(list(checks), fill_value=0)
    dropped["the same result seen elsewhere too"] = len(collected) - dropped.sum() - len(kept)
    order = ["dataset", "architecture", "flops_reduction_pct", "method", "pruned_top1"]
    return kept.sort_values(order)[list(collected)].reset_index(drop=True), dropped


def _readable(seen_at):
    """Leave out of where something was seen what only the tool that collected it understands."""
    seen_at = re.sub(r"https?://\S+/papers/(\d{4}\.\d{5})\S*", r"arXiv:\1", seen_at)
    return re.sub(r"(read via )?index id \d+([,;] )?", "", seen_at).replace(" ()", "")


def main(collected: str, out: str) -> None:
    """Trim the file `collected` to `out`, and write `published_dropped.csv` beside it."""
    rows, dropped = trim(pd.read_csv(collected, dtype={"year": "Int64"}))
    rows.to_csv(out, index=False, lineterminator="\n")
    dropped = dropped.rename_axis("reason").rename("rows").reset_index()
    dropped.to_csv(Path(out).with_name("published_dropped.csv"), index=False, lineterminator="\n")
    print(f"{len(rows)} rows kept; dropped:\n{dropped.to_string(index=False)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tcp_core.study.published COLLECTED.csv results/published.csv")
    main(*sys.argv[1:])
