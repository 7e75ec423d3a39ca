"""CONTRIBUTING.md is followed to the letter: each recipe is executed, and what it adds does its work."""

import re

import pytest
import torch
from documentation import ROOT, digits, execute, read

import tcp_core as tcp
from tcp_core import nets, tracing
from tcp_core.selection import fill
from tcp_core.study import comparators, pages, study_plots
from tcp_core.tracing import trace


@pytest.fixture(scope="module")
def done():
    """Return what the recipes leave; afterwards names and rules are as before."""
    networks, rules, given = dict(nets.NETWORKS), dict(tracing.RULES), digits()
    execute("CONTRIBUTING.md", given)
    yield given
    for table, before in ((nets.NETWORKS, networks), (tracing.RULES, rules)):
        table.clear()
        table.update(before)


@pytest.mark.medium
def test_the_comparator_meets_the_budget(done):
    report = done["result"].report
    assert 0.9 < report["utilisation"]["macs"] <= 1
    assert done["result"].widths["tailored"].sum() < done["result"].widths["dense"].sum()


def test_every_comparator_has_what_the_recipe_says():
    for name in comparators.METHODS:
        assert name in pages.METHODS, f"{name} has no words in pages.METHODS"
        assert name in study_plots.LOOK, f"{name} has no colour and marker in study_plots.LOOK"


@pytest.mark.medium
def test_the_network_can_be_tailored(done):
    images = done["images"]
    tailor = tcp.Tailor(nets.build("tiny", num_classes=10, in_channels=1), images, budget={"macs": 0.5}, steps=1000)
    assert tailor.channels.prunable.sum() == 24


@pytest.mark.medium
def test_without_the_rule_the_operator_freezes_what_enters_it(done, monkeypatch):
    network, images = done["network"], done["images"]
    with_rule = trace(network, images)
    assert with_rule.prunable.sum() == 6
    monkeypatch.delitem(tracing.RULES, "halve")
    without = trace(network, images)
    assert without.unknown
    assert without.prunable.sum() == 0


@pytest.mark.medium
def test_the_cost_is_filled_to_the_last_unit(done):
    cost, channels, score = done["Widths"](done["channels"]), done["channels"], done["score"]
    dense = cost.exact()["widths"]
    assert dense == sum(channels.widths().values())
    kept = fill(channels, score, {"widths": 100}, cost=cost)
    each = cost.marginal(torch.ones(channels.units))["widths"]
    assert cost.exact(kept)["widths"] == sum(channels.widths(kept).values())
    assert 100 - cost.exact(kept)["widths"] < each[~kept & channels.prunable].min()


def test_the_page_names_files_that_are_there():
    named = re.findall(r"`((?:tcp_core|tests|study|tracing|docs)/[\w./]+\.py)`", read("CONTRIBUTING.md"))
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "tcp_core" / name).exists(), name
