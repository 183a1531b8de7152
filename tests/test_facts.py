"""Reading config.json: problems are collected, sizes keep the config's words."""

from copy import deepcopy

import pytest

from arch_maps import config as spell
from arch_maps.facts import MAX_LAYERS, Dim, Facts, spell_shape
from arch_maps.registry import find
from validate.twin import load_example


def test_sizes_carry_their_names_through_arithmetic():
    heads, dim = Dim(4, "heads"), Dim(16, "dim")
    assert (heads * dim, (heads * dim).label) == (64, "heads*dim")
    assert (2 * heads).label == "2*heads"
    assert ((heads + dim) * 2).label == "(heads+dim)*2"
    assert (1 + heads).label == "heads+1"
    assert (dim // 4, (dim // 4).label) == (4, "dim/4")
    assert ((heads + dim) // dim).label == "(heads+dim)/dim"
    assert spell_shape((heads * (2 * dim), 3)) == "[heads*2*dim=128, 3]"


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, 2**31, [64]])
def test_a_bad_size_is_a_problem_that_names_it(value):
    facts = Facts({"text_config": {"hidden_size": value}}).section("text_config")
    assert facts.size("hidden_size") == 1
    (problem,) = facts.problems
    assert problem == (
        f"config.json: text_config.hidden_size must be a positive integer, not {value!r}"
    )


def test_a_missing_size_is_a_problem_unless_there_is_a_default():
    facts = Facts({"given": None})
    assert facts.size("given", 7) == 7
    assert facts.problems == []
    facts.size("given")
    facts.size("absent")
    facts.size("absent")
    assert facts.problems == [
        "config.json does not state given",
        "config.json does not state absent",
    ]


def test_problems_of_sections_reach_the_root():
    root = Facts({})
    root.section("vision_config").size("depth")
    assert root.problems == [
        "config.json lacks the section vision_config",
        "config.json does not state vision_config.depth",
    ]


def test_layer_counts_are_bounded():
    facts = Facts({"n": MAX_LAYERS + 1, "m": MAX_LAYERS})
    assert facts.count("m") == MAX_LAYERS
    assert facts.count("n") == 1
    assert facts.problems == [f"config.json: n = {MAX_LAYERS + 1} exceeds the limit of 4096"]


@pytest.mark.parametrize(("value", "expected"), [([2, 3], (2, 3)), (4, (4, 4)), (None, (9, 9))])
def test_pairs(value, expected):
    facts = Facts({"k": value})
    assert facts.pair("k", (9, 9)) == expected
    assert facts.pair("absent", (9, 9)) == (9, 9)
    assert facts.problems == []


@pytest.mark.parametrize(
    "pair", [[2], [1, 2, 3], [0, 1], [1, -1], [1.5, 2], ["1", 2], [True, 2], True, {}]
)
def test_bad_pairs(pair):
    facts = Facts({"k": pair})
    assert facts.pair("k", (2, 2)) == (2, 2)
    assert facts.problems == ["config.json: k must be two positive integers"]


def test_flags_and_numbers():
    facts = Facts(
        {"on": True, "word": "true", "eps": 1e-6, "bad": "1e-6", "yes": True, "nan": float("nan")}
    )
    assert facts.flag("on", False) is True
    assert facts.flag("absent", True) is True
    assert facts.number("eps") == 1e-6
    assert facts.number("absent", 2.0) == 2.0
    assert facts.problems == []
    facts.flag("word", False)
    facts.number("bad")
    facts.number("yes")
    facts.number("nan")
    facts.number("nothing")
    assert facts.problems == [
        "config.json: word must be true or false, not 'true'",
        "config.json: bad must be a number, not '1e-6'",
        "config.json: yes must be a number, not True",
        "config.json: nan must be a finite number, not nan",
        "config.json does not state nothing",
    ]


def test_expect_says_what_the_runtime_cannot_do():
    facts = Facts({"hidden_act": "relu"})
    facts.expect("hidden_act", "silu", default="silu", why="the runtimes compute SiLU")
    facts.expect("absent", "silu", default="silu", why="-")
    assert facts.problems == [
        "config.json: hidden_act is 'relu', not 'silu': the runtimes compute SiLU"
    ]


def test_notes_are_said_once():
    facts = Facts({"a": {}})
    facts.section("a").note("once")
    facts.note("once")
    assert facts.notes == ["once"]


def test_start_drops_quantization_and_untags_floats():
    config = {
        "quantization_config": {"bits": 4},
        "quantization": {},
        "limits": [{"__float__": "Infinity"}, {"deep": {"__float__": "-Infinity"}}],
    }
    out = spell.start(config)
    assert out == {"limits": [float("inf"), {"deep": float("-inf")}]}
    assert config["limits"][0] == {"__float__": "Infinity"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "partial_rotary_factor": 0.5},
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "partial_rotary_factor": 0.5,
            },
        ),
    ],
)
def test_rope_settings_of_every_generation(config, expected):
    facts = Facts(config)
    assert spell.rope(facts) == expected
    assert facts.problems == []


def test_rope_is_spelled_for_both_runtimes():
    spelled = spell.spell_rope({"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0})
    assert spelled["rope_theta"] == 1e6
    assert spelled["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}
    assert spelled["rope_parameters"] == {**spelled["rope_scaling"], "rope_theta": 1e6}
    assert spell.spell_rope({"rope_type": "default", "rope_theta": 1.0})["rope_scaling"] is None


@pytest.mark.parametrize("theta", [True, "1e6", float("nan"), float("inf")])
def test_a_bad_theta_is_a_problem(theta):
    facts = Facts({"rope_theta": theta})
    spell.rope(facts)
    assert facts.problems == [f"config.json: rope_theta must be a finite number, not {theta!r}"]


def test_rope_that_is_no_object_is_a_problem():
    facts = Facts({"rope_scaling": "linear"})
    spell.rope(facts)
    assert facts.problems == ["config.json: rope_parameters must be an object"]


def test_a_scaling_that_no_runtime_computes_is_a_problem():
    facts = Facts({"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    spell.require_rope_type(facts, spell.rope(facts))
    (problem,) = facts.problems
    assert "rope_type is 'dynamic'" in problem
    assert "default, linear, llama3, yarn" in problem


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "float32"}}, "float32"),
        ({"dtype": "float32", "text_config": {"dtype": "float16"}}, "float32"),
        ({}, None),
    ],
)
def test_stored_dtype(config, expected):
    assert spell.stored_dtype(config) == expected


def test_spell_dtype_reaches_the_sections_that_state_one():
    config = {"text_config": {"dtype": "float32"}, "other": {"x": 1}}
    spell.spell_dtype(config, "bfloat16")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["text_config"] == {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert config["other"] == {"x": 1}


def test_a_bound_that_is_null_is_not_one_that_is_missing():
    config = deepcopy(load_example("glm5_next"))
    text = config["text_config"]
    del text["linear_attn_config"]
    for stated, bound in (({}, -5.0), ({"linear_lower_bound": None}, None)):
        config["text_config"] = {**text, **stated}
        written = find("glm5_next").config(deepcopy(config), Facts(config))
        assert written["text_config"]["linear_lower_bound"] == bound
        assert written["text_config"]["linear_attn_config"]["safe_gate"] is (bound is not None)
