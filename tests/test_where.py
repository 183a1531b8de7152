"""Where a runtime parts from the reference: pairing by the map, and faults that are found."""

from __future__ import annotations

import numpy as np
import pytest

from arch_maps.ops import Affine, Concat, Source
from arch_maps.rules import Kind, Rule
from benchmarks.ground import Ground
from validate.checks import EXACT
from validate.where.bearing import bearing_of
from validate.where.compare import compare_traces
from validate.where.pairs import Pair, pair_modules
from validate.where.trace import Trace, kept_rows

TYPES = ("qwen3", "qwen3_moe", "gemma4")
"""Dense; a mixture whose experts transformers stacks; scalars on layers."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory, twin_of, runtimes):
    folder = tmp_path_factory.mktemp("grounds")
    made: dict[str, Ground] = {}

    def get(model_type: str, kind: str = "text") -> Ground:
        if model_type not in made:
            made[model_type] = Ground(twin_of(model_type), folder / model_type, kinds=(kind,))
        return made[model_type]

    return get


@pytest.mark.parametrize("model_type", TYPES)
def test_every_planted_fault_is_found_at_its_module(ground, model_type, tmp_path):
    here = ground(model_type)
    clean = here.locate()
    assert clean.first is None
    assert len(clean.steps) > 50
    faults = here.faults()
    assert {"swapped q/k", "norm off by one", "flipped 4-bit block"} <= {f.name for f in faults}
    for fault in faults:
        where = here.locate(fault)
        assert here.rightly(where, fault.modules), (fault.name, fault.modules, where.first)
    other = here.with_other_base(tmp_path / "other-base")
    assert other is not None
    assert other.first is not None
    assert other.first.mlx.endswith("layers.0.self_attn")
    assert here.locate().first is None, "a fault was left behind"


@pytest.mark.parametrize(
    ("model_type", "kind", "planted"),
    [
        ("llava", "image", ("swapped q/k", "norm off by one", "swapped projector")),
        ("dinov2", "image", ("missing layer scale", "swapped thirds of q/k/v")),
        ("qwen3_omni_moe", "audio", ("swapped q/k", "transposed convolution")),
    ],
)
def test_faults_of_towers_and_projectors_are_found(ground, model_type, kind, planted):
    here = ground(model_type, kind)
    clean = here.locate(kind=kind)
    assert clean.first is None
    assert clean.outputs < EXACT
    faults = here.faults(kind)
    always = {"flipped 4-bit block", "transposed patches"}
    always |= {"shifted positions"} if kind == "image" else set()
    assert always | {*planted} <= {fault.name for fault in faults}
    for fault in faults:
        where = here.locate(fault, kind)
        assert where.outputs > EXACT, fault.name
        assert here.rightly(where, fault.modules), (fault.name, fault.modules, where.first)


def test_the_special_faults_have_their_types(ground):
    assert "transposed expert" in {fault.name for fault in ground("qwen3_moe").faults()}
    assert "missing layer scale" in {fault.name for fault in ground("gemma4").faults()}


def test_a_fault_of_single_steps_alone_is_told_apart(ground):
    here = ground("qwen3")
    norm = next(f for f in here.faults() if f.name == "norm off by one")
    own = here.model.continued

    def later(ids, tokens):
        # The prompt as it should be; the fault comes with the first single token.
        step = type(here.model.model.language_model)
        call = step.__call__

        def calling(self, inputs, *given, **named):
            if inputs.shape[1] == 1:
                here.site.plant(norm)
            return call(self, inputs, *given, **named)

        step.__call__ = calling
        try:
            return own(ids, tokens)
        finally:
            step.__call__ = call
            here.site.mend(norm)

    here.model.continued = later
    try:
        where = here.locate()
    finally:
        here.model.continued = own
    assert where.first is not None
    assert where.first.decode
    assert where.first.mlx in norm.modules
    assert "single-token steps" in where.first.text()


def rule(target: str, expr) -> Rule:
    return Rule(target, expr, Kind.LINEAR, "text")


def test_modules_pair_by_what_the_map_joins_however_they_are_nested():
    q, k, up = (Source(f"net.0.{name}.weight", (4, 4)) for name in ("att.q", "att.k", "ff.up"))
    rules = [
        rule("l.0.attn.q.weight", q),
        rule("l.0.attn.k.weight", k),
        rule("l.0.mlp.inner.up.weight", Affine(up, scale=2.0)),
    ]
    held = {leaf.name: leaf.name for leaf in (q, k, up)}
    loaded = {r.target: f"model.{r.target}" for r in rules}
    pairs = {(pair.torch, pair.mlx): pair.scaled for pair in pair_modules(rules, held, loaded)}
    assert pairs[("net.0.att.q", "model.l.0.attn.q")] is False
    assert ("net.0.att", "model.l.0.attn") in pairs
    assert pairs[("net.0.ff.up", "model.l.0.mlp.inner.up")] is True
    assert ("net.0", "model.l.0") in pairs
    assert ("net.0.ff", "model.l.0.attn") not in pairs


def test_a_fused_projection_is_no_pair_of_its_parts_but_attention_is():
    q, k = (Source(f"a.{name}.weight", (4, 4)) for name in ("q", "k"))
    fused = rule("b.qk.weight", Concat((q, k)))
    pairs = pair_modules([fused], {q.name: q.name, k.name: k.name}, {"b.qk.weight": "b.qk.weight"})
    assert pairs == [Pair("a", "b")]


def traces(*values: tuple[str, str, list[float]]) -> Trace:
    made = Trace()
    for path, side, row in values:
        made.add(path, side, np.array([row], np.float32))
    return made


def test_what_the_two_sides_only_draw_elsewhere_is_no_fault():
    pairs = [Pair("emb", "emb"), Pair("a", "a"), Pair("b", "b")]
    right = traces(
        ("emb", "out", [2, 4]), ("a", "in", [2, 4]), ("a", "out", [1, 5]), ("b", "out", [3, 3])
    )
    moved = traces(
        ("emb", "out", [1, 2]), ("a", "in", [2, 4]), ("a", "out", [1, 5]), ("b", "out", [3, 4])
    )
    where = compare_traces(pairs, right, right, moved, prompt=1, steps=0, outputs=1.0)
    assert where.first is not None
    assert where.first.mlx == "b"
    same = compare_traces(pairs, right, right, moved, prompt=1, steps=0, outputs=0.0)
    assert same.first is None


def test_the_floor_is_the_reference_s_own_noise():
    pairs = [Pair("a", "a")]
    right, found = traces(("a", "out", [1, 1])), traces(("a", "out", [1, 1.01]))
    noisy = traces(("a", "out", [1, 1.001]))
    assert compare_traces(pairs, right, right, found, prompt=1, steps=0, outputs=1.0).first
    quiet = compare_traces(pairs, right, noisy, found, prompt=1, steps=0, outputs=0.01)
    assert quiet.first is None


def test_wrong_outputs_that_no_compared_module_explains_are_the_model_s():
    pairs, right = [Pair("a", "a")], traces(("a", "out", [1, 1]))
    where = compare_traces(pairs, right, right, right, prompt=1, steps=0, outputs=0.5)
    assert where.first is not None
    assert where.first.text() == (
        "first parts at the model itself, between a and its end: off by 5.0e-01 where the "
        "reference's own noise is 2.4e-07"
    )


def test_what_has_no_bearing_on_the_outputs_is_told_by_their_gradient():
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unread = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
            self.conv = torch.nn.Conv1d(4, 3, 1)

        def forward(self, x):
            x = self.a(x)
            self.unread(x)
            return self.conv(x[None, 1:].mT)[0].mT  # the first row is left out

    net = Net()
    assert all(value.requires_grad for value in net.parameters())
    found = bearing_of(
        net,
        {"x": torch.randn(3, 4)},
        first=lambda values: values[0],
        ordered=lambda module, value: value.mT if module is net.conv else value,
        call=lambda model, inputs: model(**inputs),
        most=1 << 20,
    )
    assert {key: rows.tolist() for key, rows in found.items()} == {
        ("a", "out"): [False, True, True],
        ("unread", "in"): [False, True, True],
        ("unread", "out"): [False, False, False],
        ("conv", "in"): [True, True],
        ("conv", "out"): [True, True],
    }
    assert all(value.requires_grad and value.grad is None for value in net.parameters())


def test_rows_without_bearing_are_not_compared():
    pairs, wanted = [Pair("a", "a")], np.array([[1, 1], [1, 1]], np.float32)
    right, found = Trace(), Trace()
    right.add("a", "out", wanted)
    found.add("a", "out", wanted + np.array([[1], [0]]))
    given = {"prompt": 2, "steps": 0, "outputs": 1.0}
    assert compare_traces(pairs, right, right, found, **given).steps[0].error == 1
    rows = {("a", "out"): np.array([False, True])}
    assert compare_traces(pairs, right, right, found, **given, bearing=rows).steps[0].error == 0
    nothing = {("a", "out"): np.array([False, False])}
    assert not compare_traces(pairs, right, right, found, **given, bearing=nothing).steps


def test_a_value_that_is_right_in_another_module_is_no_fault():
    pairs = [Pair("net.a", "a"), Pair("net", "net"), Pair("b", "b")]
    right = traces(("net.a", "out", [1, 2]), ("net", "out", [1, 2]), ("b", "out", [5, 6]))
    found = traces(("a", "out", [1, 2]), ("net", "out", [9, 9]), ("b", "out", [5, 7]))
    where = compare_traces(pairs, right, right, found, prompt=1, steps=0, outputs=1.0)
    assert where.first is not None
    assert where.first.mlx == "b"


def test_some_rows_of_large_calls_are_enough():
    values = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    wrong = values + 1

    def kept(array) -> Trace:
        made = Trace()
        rows = kept_rows(array.shape, 64)
        made.add("a", "out", array.reshape(-1, 8)[rows], array.shape)
        assert len(rows) == 8
        return made

    pairs = [Pair("a", "a")]
    given = {"prompt": 100, "steps": 0, "outputs": 1.0}
    right = kept(values)
    assert compare_traces(pairs, right, right, kept(values[None]), **given).steps[0].error == 0
    assert compare_traces(pairs, right, right, kept(wrong), **given).first is not None
    assert not compare_traces(pairs, right, right, kept(values[:99]), **given).steps


def test_rows_are_kept_evenly_and_the_same_of_the_same_shape():
    assert kept_rows((1, 100, 64), 1 << 20) is None
    rows = kept_rows((1, 4096, 1024), 1 << 20)
    assert rows is not None
    assert (rows[0], rows[-1], len(rows)) == (0, 4095, 1024)
    assert np.array_equal(rows, kept_rows((4096, 1024), 1 << 20))
