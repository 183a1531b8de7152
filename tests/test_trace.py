"""What MLX records of a function, as expressions; and the runtimes' loaders on headers alone."""

import json
import math

import numpy as np
import pytest
from header_fixtures import fixtures, source_of
from test_maps import twin_source
from tracing import Numbered, differences, traced_by

from arch_maps.facts import Facts
from arch_maps.ops import Constant, Permute, Reshape, Source, Stack, evaluate, streamable
from arch_maps.registry import find
from converter.plan import Options, build_plan
from converter.plan.match import match_release
from validate.lowering import Lowering, Opaque, Recorder, settled
from validate.runtime import RuntimeRefusal
from validate.trace import reload_problems, trace_loader

pytestmark = pytest.mark.usefixtures("runtimes")
SHAPES = {"a": (4, 6), "b": (6, 8), "c": (4, 6), "v": (12,), "k": (2, 3, 4)}


def record(function):
    """The function's results as expressions over its inputs, and the inputs' values."""
    import mlx.core as mx

    leaves = [Source(name, shape) for name, shape in SHAPES.items()]
    recorder = Recorder()
    mx.export_function(
        recorder, lambda *x: function(mx, *x), *(mx.zeros(leaf.shape) for leaf in leaves)
    )
    lowering = Lowering(recorder, leaves)
    return [settled(lowering.value(name)) for name, _, _ in recorder.outputs]


MOVES = {
    "transpose": lambda mx, a, b, c, v, k: a.transpose(1, 0),
    "moveaxis": lambda mx, a, b, c, v, k: mx.moveaxis(k, 2, 1),
    "slices": lambda mx, a, b, c, v, k: b[1:5, 2:],
    "every second row": lambda mx, a, b, c, v, k: b[::2],
    "every third column, from the second": lambda mx, a, b, c, v, k: a[:, 1::3],
    "reversed": lambda mx, a, b, c, v, k: a[::-1],
    "split": lambda mx, a, b, c, v, k: mx.split(b, 4, axis=1)[2],
    "split at": lambda mx, a, b, c, v, k: mx.split(b, [1, 5], axis=-1)[1],
    "stack": lambda mx, a, b, c, v, k: mx.stack([a, c]),
    "stack inside": lambda mx, a, b, c, v, k: mx.stack([a, c], axis=1),
    "concatenate": lambda mx, a, b, c, v, k: mx.concatenate([a, c], axis=1),
    "interleave": lambda mx, a, b, c, v, k: mx.stack([a, c], axis=1).reshape(8, 6),
    "unflatten": lambda mx, a, b, c, v, k: mx.unflatten(v, 0, (3, -1)).swapaxes(0, 1),
    "expand and squeeze": lambda mx, a, b, c, v, k: a[None, :, 0:1].squeeze(),
    "rows in another order": lambda mx, a, b, c, v, k: a[mx.array([2, 3, 0, 1])],
    "de-interleaved": lambda mx, a, b, c, v, k: v[mx.arange(12).reshape(6, 2).T.reshape(-1)],
    "take columns": lambda mx, a, b, c, v, k: mx.take(a, mx.array([4, 5, 0]), axis=1),
    "repeat": lambda mx, a, b, c, v, k: mx.repeat(a, 2, axis=0),
    "tile": lambda mx, a, b, c, v, k: mx.tile(v, (2,)),
    "one plus": lambda mx, a, b, c, v, k: v + 1.0,
    "half of, less": lambda mx, a, b, c, v, k: a * 0.5 - 3,
    "negative": lambda mx, a, b, c, v, k: -v,
    "cast": lambda mx, a, b, c, v, k: a.astype(mx.bfloat16),
    "itself": lambda mx, a, b, c, v, k: k,
}


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES)
def test_an_expression_computes_what_mlx_computes(function):
    import mlx.core as mx

    (value,) = record(lambda *x: [function(*x)])
    numbered = Numbered(SHAPES)
    arrays = [mx.array(numbered.values[name].astype(np.float32)) for name in SHAPES]
    expected = np.array(function(mx, *arrays).astype(mx.float32))
    assert value.shape == expected.shape
    np.testing.assert_array_equal(evaluate(value, numbered).reshape(value.shape), expected)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda mx, a, b, c, v, k: mx.split(mx.concatenate([a, c]), 2)[1], Source("c", (4, 6))),
        (lambda mx, a, b, c, v, k: mx.stack([a, c])[0], Source("a", (4, 6))),
        (lambda mx, a, b, c, v, k: a.T.T, Source("a", (4, 6))),
        (lambda mx, a, b, c, v, k: a.reshape(-1).reshape(4, 6), Source("a", (4, 6))),
        (lambda mx, a, b, c, v, k: mx.concatenate([b[:3], b[3:]]), Source("b", (6, 8))),
        (lambda mx, a, b, c, v, k: mx.zeros((3, 2)), Constant((3, 2), 0.0)),
        (lambda mx, a, b, c, v, k: mx.ones((3, 2)) * 2, Constant((3, 2), 2.0)),
        (
            lambda mx, a, b, c, v, k: mx.stack([a.T, c.T]),
            Stack((Permute(Source("a", (4, 6)), (1, 0)), Permute(Source("c", (4, 6)), (1, 0)))),
        ),
        (lambda mx, a, b, c, v, k: k[:, :, None], Reshape(Source("k", (2, 3, 4)), (2, 3, 1, 4))),
    ],
)
def test_moves_take_their_shortest_form(function, expected):
    assert record(lambda *x: [function(*x)]) == [expected]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda mx, a, b, c, v, k: mx.full((3,), float("nan")), "no tensor of the release fills"),
        (lambda mx, a, b, c, v, k: mx.exp(a), "it computes Exp"),
        (lambda mx, a, b, c, v, k: a @ b, "it computes Matmul"),
        (lambda mx, a, b, c, v, k: a + c, "it computes Add of two tensors"),
        (lambda mx, a, b, c, v, k: a / mx.array([1.0, 2, 3, 4, 5, 6]), "Divide of two tensors"),
        (lambda mx, a, b, c, v, k: mx.array([1.0, 2.0]), "it fills in a table of its own"),
        (lambda mx, a, b, c, v, k: mx.random.normal((3,)), "no tensor of the release fills it"),
        (lambda mx, a, b, c, v, k: mx.exp(a)[:2].T, "it computes Exp"),
    ],
)
def test_what_the_rules_cannot_say_is_opaque_with_the_reason(function, why):
    (value,) = record(lambda *x: [function(*x)])
    assert isinstance(value, Opaque)
    assert why in value.why


# The stock loaders

FOLLOWED = {
    "qwen3": ("mlx_vlm", "mlx_lm"),
    "mixtral": ("mlx_vlm", "mlx_lm"),
    "gemma3": ("mlx_vlm",),
    "qwen3_5": ("mlx_vlm",),
    "deepseek_v3": ("mlx_vlm", "mlx_lm"),
    "granitemoe": ("mlx_lm",),
    "minicpmv4_6": ("mlx_vlm",),
    "phi3": ("mlx_lm",),
    "qwen3_next": ("mlx_lm",),
    "bert": ("mlx_vlm",),
}


@pytest.mark.parametrize(
    ("model_type", "runtime"), [(t, r) for t, names in FOLLOWED.items() for r in names]
)
def test_written_maps_do_what_the_loaders_do(model_type, runtime):
    source, arch = twin_source(model_type), find(model_type)
    rules = {rule.target: rule.expr for rule in match_release(source, arch).rules}
    assert differences(traced_by(source, arch, runtime), rules) == []


def test_a_wrong_rule_is_seen():
    source, arch = twin_source("mixtral"), find("mixtral")
    rules = {rule.target: rule.expr for rule in match_release(source, arch).rules}
    target = "model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"
    rules[target] = Stack(rules[target].parts[::-1])
    traced = traced_by(source, arch, "mlx_lm")
    assert differences(traced, rules) == [f"{target}: made of other elements"]


def test_a_release_of_full_size_is_followed_without_its_weights():
    """The 671 billion parameters of DeepSeek-V3 in seconds, and in streamable rules."""
    fixture = next(f for f in fixtures() if f.id == "deepseek_v3/DeepSeek-V3")
    source, arch = fixture.source(), find("deepseek_v3")
    traced = traced_by(source, arch, "mlx_lm")
    assert traced.problems() == []
    assert len(traced.parameters) == len(match_release(source, arch).rules)
    experts = traced.parameters["model.layers.3.mlp.switch_mlp.gate_proj.weight"]
    assert experts.value == Stack(
        tuple(
            Source(f"model.layers.3.mlp.experts.{i}.gate_proj.weight", (2048, 7168))
            for i in range(256)
        )
    )
    assert experts.quantizable
    assert streamable(experts.value)
    total = sum(math.prod(p.value.shape) for p in traced.parameters.values())
    assert 670e9 < total < 672e9


@pytest.mark.parametrize("runtime", ["mlx_vlm", "mlx_lm"])
def test_a_loader_refuses_in_its_own_words(runtime):
    source, arch = twin_source("qwen3"), find("qwen3")
    config = arch.config(dict(source.config), Facts(source.config))
    headers = {n: (t.dtype, t.shape) for n, t in source.tensors.items()}
    headers["model.layers.0.mlp.side_proj.weight"] = ("BF16", (8, 8))
    with pytest.raises(RuntimeRefusal, match=r"the release: .*not in model: .*side_proj\.weight"):
        trace_loader({**source.config, **config}, headers, runtime=runtime)


def test_a_parameter_that_the_loader_leaves_alone_is_named(monkeypatch):
    """A loader that is not strict, and a release that lacks a tensor."""
    nn = __import__("importlib").import_module("mlx.nn")
    strict = nn.Module.load_weights
    monkeypatch.setattr(
        nn.Module, "load_weights", lambda self, weights, **_: strict(self, weights, strict=False)
    )
    source, arch = twin_source("qwen3"), find("qwen3")
    headers = {n: (t.dtype, t.shape) for n, t in source.tensors.items()}
    del headers["model.layers.1.mlp.up_proj.weight"]
    traced = trace_loader(
        arch.config(dict(source.config), Facts(source.config)), headers, runtime="mlx_lm"
    )
    (problem,) = traced.problems()
    assert problem.startswith("model.layers.1.mlp.up_proj.weight: ")
    assert problem.endswith("no tensor of the release fills it")


# What is written is what is loaded


def written(model_type, options=None, **config):
    source, arch = twin_source(model_type), find(model_type)
    plan = build_plan(source, match_release(source, arch), options or Options())
    headers = {t.name: (t.dtype, t.shape) for shard in plan.shards for t in shard.tensors}
    return json.loads(json.dumps(plan.config)) | config, headers


def test_a_planned_output_is_loaded_as_it_is_written():
    for runtime in ("mlx_vlm", "mlx_lm"):
        assert reload_problems(*written("qwen3_5_text"), runtime="mlx_vlm") == []
        assert reload_problems(*written("mixtral"), runtime=runtime) == []


def test_a_loader_that_shifts_again_is_seen():
    """Torch's convolution layout is what tells the runtime that norms are not shifted yet."""
    config, headers = written("qwen3_5_text")
    for name, (code, shape) in headers.items():
        if name.endswith("conv1d.weight"):
            headers[name] = (code, (shape[0], shape[2], shape[1]))
    problems = reload_problems(config, headers, runtime="mlx_vlm")
    assert any("input_layernorm.weight: mlx-vlm 0.7.10 changes it again" in p for p in problems)


def test_a_parameter_that_nothing_fills_is_seen():
    config, headers = written("qwen3")
    del headers["model.layers.1.mlp.up_proj.weight"]
    (problem,) = reload_problems(config, headers, runtime="mlx_lm")
    assert "Missing 1 parameters: model.layers.1.mlp.up_proj.weight" in problem


def test_the_same_bytes_may_be_written_twice_only_where_that_is_said():
    config, headers = written("gemma3_text")
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    assert head in headers
    assert reload_problems(config, headers, runtime="mlx_vlm") != []
    alike = {head: table, table: table}
    assert reload_problems(config, headers, runtime="mlx_vlm", alike=alike) == []


def test_headers_of_a_fixture_are_a_source():
    source = source_of({"model_type": "x"}, {"a": ("F32", (2, 2))})
    assert source.tensors["a"].shape == (2, 2)
