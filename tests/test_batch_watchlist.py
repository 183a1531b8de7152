"""Watch lists: what they may say, and every way of saying it wrong."""

import re
from pathlib import Path

import pytest
import yaml

from converter.batch.recipes import options_from, policy_of, recipe_hash, recipes_of
from converter.batch.watchlist import WatchList, read_watchlist
from converter.errors import UsageError
from converter.plan import Options
from quant.recipe import QuantSpec

DOC = Path(__file__).parents[1] / "docs" / "nightly.md"
LEAST = 'namespace = "night"\n[[watch]]\nmodels = ["a/b"]\nvariants = ["4bit"]\n'


def write(tmp_path, text, name="watch.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def problems(tmp_path, text, name="watch.toml") -> list[str]:
    path = write(tmp_path, text, name)
    with pytest.raises(UsageError) as caught:
        read_watchlist(path)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def examples() -> list[tuple[str, str]]:
    return re.findall(r"```(toml|yaml)\n(.*?)```", DOC.read_text(), re.DOTALL)


def test_the_documented_examples_are_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("LEDGER_PASSWORD", "s3cret")
    monkeypatch.setenv("NIGHT_WEBHOOK", "https://hooks.example/x")
    monkeypatch.setenv("MAIL_PASSWORD", "s3cret")
    found = examples()
    assert {kind for kind, _ in found} == {"toml", "yaml"}
    for kind, text in found:
        watchlist = read_watchlist(write(tmp_path, text, f"watch.{kind}"))
        for entry in watchlist.watch:
            assert recipes_of(watchlist, entry)
    complete = read_watchlist(write(tmp_path, found[0][1]))
    assert complete.ledger == "postgresql://night:s3cret@db.lan/night"
    assert complete.budgets.disk == 800 * 10**9
    assert complete.budgets.memory == 48 * 2**30
    assert complete.budgets.bandwidth == 60e6
    assert complete.watch[0].filters.max_age == 14 * 86400


def keys_of(model) -> set[str]:
    found = set(model.model_fields)
    for field in model.model_fields.values():
        for part in re.findall(r"converter\.batch\.watchlist\.(\w+)", str(field.annotation)):
            found |= keys_of(
                getattr(__import__("converter.batch.watchlist", fromlist=[part]), part)
            )
    return found


def test_every_key_is_documented():
    text = DOC.read_text()
    assert [key for key in sorted(keys_of(WatchList)) if f"`{key}`" not in text] == []
    assert "max_size" in keys_of(WatchList)


def test_the_least_watch_list(tmp_path):
    watchlist = read_watchlist(write(tmp_path, LEAST))
    (entry,) = watchlist.watch
    assert recipes_of(watchlist, entry) == {"4bit": Options(quant=QuantSpec.make("affine", 4))}
    assert watchlist.target("a/b", "4bit") == "night/b-4bit"
    assert policy_of(watchlist, entry).twin


def test_yaml_says_the_same(tmp_path):
    import tomllib

    data = tomllib.loads(LEAST)
    for name in ("watch.yaml", "watch.yml"):
        assert read_watchlist(write(tmp_path, yaml.safe_dump(data), name)) == read_watchlist(
            write(tmp_path, LEAST)
        )


def test_all_problems_are_told_at_once_with_their_keys(tmp_path):
    text = """
namespace = "no/slash"
privat = true
names = "{variant}"
[[watch]]
models = ["b"]
variants = ["4bit", "9bit", "5"]
[watch.filters]
max_sise = "4GB"
max_age = "soon"
[watch.gates]
kl_threshold = "much"
[budgets]
jobs = 0
disk = "many"
[recipes.own]
q_bits = 7
"""
    assert problems(tmp_path, text) == [
        "namespace: 'no/slash' is not the name of an account",
        "names: '{variant}' is not made of {organisation}, {model}, {variant}, letters, digits, -, "
        "_ and .; {model} must be among them",
        "watch[0].models[0]: 'b' is not a repo such as Qwen/Qwen3-0.6B, or REPO@REVISION",
        "watch[0].variants[1]: --q-bits 9 contradicts --q-mode affine, which takes "
        "2, 3, 4, 5, 6 or 8",
        "watch[0].variants[2]: '5' is not one of bf16, fp16, fp32, 2bit ... 8bit, mxfp4, mxfp8, "
        "nvfp4",
        "watch[0].filters.max_age: 'soon' is not a duration such as 30m, 12h or 14d",
        "watch[0].filters.max_sise: unknown key; did you mean max_size?",
        "watch[0].gates.kl_threshold: Input should be a valid number",
        "recipes.own: --q-bits 7 contradicts --q-mode affine, which takes 2, 3, 4, 5, 6 or 8",
        "budgets.disk: 'many' is not a size such as 80GB or 24GiB",
        "budgets.jobs: Input should be greater than or equal to 1",
        "privat: unknown key; did you mean private?",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("4bit", "own"), "watch[0].variants[0]: 'own' is not one of"),
        (('variants = ["4bit"]', 'recipes = ["mine"]'), "recipes: there is no recipe 'mine'"),
        (('variants = ["4bit"]', ""), "watch[0]: names neither variants nor recipes"),
        (('models = ["a/b"]', ""), "watch[0]: names neither organisations nor models"),
        (('namespace = "night"', ""), "namespace: is missing"),
        (('"night"', '"night"\nnames = "{nodel}"'), "names: '{nodel}' is not made of"),
        (('"night"', '"night"\nledger = "x://${NO_SUCH}"'), "the environment has no NO_SUCH"),
        (('"night"', "1"), "namespace: Input should be a valid string"),
        (("[[watch]]", "[[watch]"), "is not TOML"),
    ],
)
def test_single_mistakes(tmp_path, change, message):
    assert message in problems(tmp_path, LEAST.replace(*change))[0]


def test_other_files_are_refused(tmp_path):
    assert "ends in .toml, .yaml or .yml" in problems(tmp_path, LEAST, "watch.json")[0]
    assert "is not YAML" in problems(tmp_path, "a: [", "watch.yaml")[0]
    with pytest.raises(UsageError, match="cannot be read"):
        read_watchlist(tmp_path / "none.toml")


def test_recipes_survive_the_ledger(tmp_path):
    text = LEAST.replace('variants = ["4bit"]', 'recipes = ["own", "plain", "seen"]') + (
        '[recipes.own]\nq_bits = 4\nq_group_size = 32\nq_method = "search"\n'
        'quant_predicate = "mixed_4_6"\n[recipes.plain]\ndtype = "float16"\n'
        '[recipes.seen]\nq_bits = 3\nq_method = "imatrix"\n'
    )
    watchlist = read_watchlist(write(tmp_path, text))
    recipes = recipes_of(watchlist, watchlist.watch[0])
    assert recipes["seen"].calibration is not None
    for options in recipes.values():
        assert options_from(options.to_json()) == options
    assert len({recipe_hash(options) for options in recipes.values()}) == 3
