"""Bits of a KV cache shared among layers: the best of all within the budget."""

from dataclasses import replace

import numpy as np
import pytest

from quant.kv.allocate import allocate, allocated_spec, choices
from quant.kv.scan import LayerFacts, effective_bits
from quant.kv.split import Layout
from quant.kv.turbo import KvError

pytestmark = pytest.mark.usefixtures("runtimes")


def layers(count, dim=128, **given):
    return [
        LayerFacts(index=i, cache="KVCache", key_dim=dim, value_dim=dim, **given)
        for i in range(count)
    ]


def curves(facts, weight):
    """Losses that fall fourfold a bit, as rate-distortion has it, scaled by ``weight``."""
    one = Layout(dim=facts[0].key_dim)
    return {
        (fact.index, role): [
            replace(choice, kl=weight(fact.index, role) * 4.0**-choice.bits)
            for choice in choices(one, {2: 1.0})
        ]
        for fact in facts
        for role in ("key", "value")
    }


def test_equal_layers_get_equal_bits_within_the_budget():
    facts = layers(4)
    chosen = allocate(facts, curves(facts, lambda *_: 1.0), bits=4.125)
    assert {one.bits for one in chosen.values()} == {4}
    assert effective_bits(allocated_spec(facts, chosen), facts) == pytest.approx(4.125)


def test_allocation_is_the_best_of_all():
    """Against every combination of widths, in quarters of a bit, for two layers."""
    from functools import reduce

    facts = layers(2)
    weight = {(0, "key"): 900.0, (0, "value"): 1.0, (1, "key"): 30.0, (1, "value"): 4.0}
    measured = curves(facts, lambda layer, role: weight[layer, role])
    for budget in (2.625, 3.375, 4.125, 5.125):
        chosen = allocate(facts, measured, bits=budget)
        paid = sum(one.price for one in chosen.values()) / (4 * 128)
        assert budget - 8 / (4 * 128) < paid <= budget  # but for part of a unit all is spent
        found = sum(one.kl for one in chosen.values())
        steps = 2 + np.arange(25) / 4
        losses = reduce(np.add.outer, [one * 4.0**-steps for one in weight.values()])
        stored = reduce(np.add.outer, [steps] * 4) / 4 + 0.125
        assert found <= losses[stored <= paid].min() * (1 + 1e-9)


def test_layouts_are_compared_at_equal_bytes():
    """Of small heads two layouts rarely have one price; the one that is cheaper for a loss wins."""
    facts = layers(1, dim=32)
    plain, aside = Layout(dim=32), Layout(dim=32, aside=((3, 4),))

    def lost(one, price):  # the second is better from 160 bits a vector on
        slope, start = (1.0, 0.0) if one is plain else (1.6, 0.6 * 160 / 32)
        return 4.0 ** -(slope * price / 32 - start)

    every = [
        replace(choice, kl=lost(choice.layout, choice.price))
        for one in (plain, aside)
        for choice in choices(one, {1: 1.0})
    ]
    assert not {one.price for one in every if one.layout is plain} <= {
        one.price for one in every if one.layout is aside
    }
    measured = {(0, "key"): every, (0, "value"): every}
    for bits, one in ((4.0, plain), (6.0, aside)):
        chosen = allocate(facts, measured, bits=bits)
        assert {choice.layout for choice in chosen.values()} == {one}
        paid = sum(choice.price for choice in chosen.values())
        assert paid <= bits * 64
        spec = allocated_spec(facts, chosen)
        assert effective_bits(spec, facts) == pytest.approx(paid / 64)


def test_a_layer_that_minds_gets_more():
    facts = layers(3)
    chosen = allocate(
        facts, curves(facts, lambda i, r: 1e4 if (i, r) == (1, "key") else 1.0), bits=4
    )
    bits = {place: one.bits for place, one in chosen.items()}
    assert bits.pop((1, "key")) > max(bits.values())


def test_too_few_bits_are_refused():
    facts = layers(2)
    with pytest.raises(KvError, match=r"2 bits are too few: the narrowest choice has 2\.125"):
        allocate(facts, curves(facts, lambda *_: 1.0), bits=2)


def test_losses_between_measured_widths_follow_the_codebooks():
    from quant.kv.allocate import _between
    from quant.kv.codebook import distortion

    plain = Layout(dim=64)
    for power in (0.7, 1.0, 1.4):
        known = {b: 3.0 * distortion(64, b) ** power for b in (2, 4)}
        below = 3.0 * distortion(64, 1.5) ** power
        assert _between(known, 1.5, plain) == pytest.approx(below)
        assert _between(known, 3, plain) == pytest.approx(3.0 * distortion(64, 3) ** power)
        beyond = known[4] * distortion(64, 6) / distortion(64, 4)
        assert _between(known, 6, plain) == pytest.approx(beyond)
        assert _between(known, 4, plain) == known[4]
