"""Watch lists: what they may say, and every way of saying it wrong."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from release_helpers import factors, peft_config, peft_pair, write_adapter

from converter.batch.failures import AdapterError
from converter.batch.recipes import Asked, digest, policy_of, recipes_of
from converter.batch.strict_yaml import load
from converter.batch.watchlist import Recipe, Watch, WatchList, read_watchlist
from converter.cli.app import cli
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
    (asked,) = recipes_of(watchlist, entry).values()
    assert asked == Asked(options=Options(quant=QuantSpec.make("affine", 4)))
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
        "watch[0].gates.kl_threshold: must be a number",
        "recipes.own: --q-bits 7 contradicts --q-mode affine, which takes 2, 3, 4, 5, 6 or 8",
        "budgets.disk: 'many' is not a size such as 80GB or 24GiB",
        "budgets.jobs: must be greater than or equal to 1",
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
        (('"night"', "1"), "namespace: must be text, in quotes"),
        (("[[watch]]", "[[watch]"), "is not TOML"),
        (('["4bit"]', '"4bit"'), "watch[0].variants: must be a list, in square brackets"),
        (('["4bit"]', '["4bit"]\nledger = "x"'), "it belongs at the top of the file, before the"),
        (('["4bit"]', '["4bit"]\nmax_size = "4GB"'), "max_size: unknown key; it belongs into filt"),
        (('["4bit"]', '["4bit"]\ncalibration_data = "/no"'), "calibration_data: /no: no such file"),
        (('"night"', '"night"\nrecipes = {x = 4}'), "recipes.x: must be a table of keys"),
    ],
)
def test_single_mistakes(tmp_path, change, message):
    assert message in problems(tmp_path, LEAST.replace(*change))[0]


def test_other_files_are_refused(tmp_path):
    assert "ends in .toml, .yaml or .yml" in problems(tmp_path, LEAST, "watch.json")[0]
    assert "is not YAML" in problems(tmp_path, "a: [", "watch.yaml")[0]
    assert problems(tmp_path, "just text", "watch.yaml") == ["must be a table of keys"]
    assert "is not YAML" in problems(tmp_path, "? [a]\n: 1\n? [a]\n: 2\n", "watch.yaml")[0]
    twice = "namespace: night\nnamespace: other\n"
    told = "\n".join(problems(tmp_path, twice, "watch.yaml"))
    assert "the key 'namespace' is given twice" in told
    assert "line 2" in told
    assert problems(tmp_path, "namespace = 1\nwatch = []")[1:] == ["watch: must not be empty"]
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read: No such file or directory"):
        read_watchlist(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read: it is no UTF-8 text"):
        read_watchlist(tmp_path / "binary.toml")


OWN = LEAST.replace('variants = ["4bit"]', 'recipes = ["own"]') + "[recipes.own]\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("q_target_bpw = 4.5\nq_bits = 4", "q_bits: q_target_bpw and q_target_size choose it"),
        ('q_target_bpw = 4.5\nq_mode = "mxfp4"', "q_mode: q_target_bpw and q_target_size choose"),
        ('q_target_bpw = 4.5\nq_target_size = "4GB"', "are two targets; give one"),
        ("q_group_size = 32", "q_group_size and q_method have no effect without q_bits, q_mode or"),
        ("q_bits = 4\ntuning_iterations = 9", "tuning_iterations has no effect with q_method rtn"),
        (
            "q_bits = 4\ncalibration_length = 9",
            "calibration_length has no effect with q_method rtn",
        ),
        (
            "q_bits = 4\ndequantize = true",
            "dequantize gives plain weights, and other keys quantize",
        ),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path, keys, message):
    (line,) = problems(tmp_path, OWN + keys)
    assert line.startswith("recipes.own: ")
    assert message in line


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("q_target_bpw = 0.5", "q_target_bpw: must be greater than or equal to 1"),
        ('q_target_size = "large"', "q_target_size: 'large' is not a size such as"),
        ('adapter_path = "/no/such"', "adapter_path: /no/such: no such folder"),
        ('adapter_path = "{here}"', "adapter_path: {here}: holds no adapter; there must be"),
        ("q_target = 4", "q_target: unknown key; did you mean q_target_"),
        ("tuning_iterations = 0", "tuning_iterations: must be greater than or equal"),
        ('mtp = "yes"', "mtp: must be true or false"),
    ],
)
def test_keys_of_recipes_are_checked_when_they_are_read(tmp_path, keys, message):
    (line,) = problems(tmp_path, OWN + keys.format(here=tmp_path))
    assert line.startswith(f"recipes.own.{message.format(here=tmp_path)}")


def adapter(folder, scale=1.0):
    pairs = peft_pair(
        "model.layers.0.mlp.down_proj", *(scale * one for one in factors((64, 128), 2, 2))
    )
    return write_adapter(folder, peft_config(r=2), pairs)


def test_a_target_and_an_adapter_tell_recipes_apart(tmp_path):
    def asked(keys):
        watchlist = read_watchlist(write(tmp_path, OWN + keys))
        return recipes_of(watchlist, watchlist.watch[0])["own"]

    lora = adapter(tmp_path / "lora")
    made = [
        asked(keys)
        for keys in (
            "q_bits = 4",
            "q_target_bpw = 4.5",
            "q_target_bpw = 4.5\nq_group_size = 64",
            'q_target_size = "4GB"',
            'q_target_bpw = 4.5\nq_method = "imatrix"',
            f'q_bits = 4\nadapter_path = "{lora}"',
        )
    ]
    assert made[1].options == Options(quant=QuantSpec.make("affine"), target_bits=4.5)
    assert made[2].options.target_group_size == 64
    assert made[3].options.target_bytes == 4 * 10**9
    assert made[4].options.calibration is not None
    for one in made:
        assert Asked.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert len({one.hash for one in made}) == len(made)
    moved = tmp_path / "elsewhere" / "lora"
    moved.parent.mkdir()
    lora.rename(moved)
    assert asked(f'q_bits = 4\nadapter_path = "{moved}"').hash == made[-1].hash
    with pytest.raises(AdapterError, match=r"on this machine: .*no such folder"):
        made[-1].checked_adapter()
    other = adapter(lora, scale=2.0)
    with pytest.raises(AdapterError, match="has changed since the watch list was read"):
        made[-1].checked_adapter()
    assert asked(f'q_bits = 4\nadapter_path = "{other}"').hash != made[-1].hash


def test_calibration_text_serves_a_target(tmp_path):
    (tmp_path / "notes.txt").write_text("some text, and more of it. " * 4000)
    data = f'calibration_data = "{tmp_path / "notes.txt"}"\n[recipes.own]'
    watchlist = read_watchlist(
        write(tmp_path, OWN.replace("[recipes.own]", data) + "q_target_bpw = 4.5")
    )
    asked = recipes_of(watchlist, watchlist.watch[0])["own"]
    assert asked.options.calibration is not None


def test_recipes_survive_the_ledger(tmp_path):
    text = LEAST.replace('variants = ["4bit"]', 'recipes = ["own", "plain", "seen", "tuned"]') + (
        '[recipes.own]\nq_bits = 4\nq_group_size = 32\nq_method = "search"\n'
        'quant_predicate = "mixed_4_6"\n[recipes.plain]\ndtype = "float16"\n'
        '[recipes.seen]\nq_bits = 3\nq_method = "imatrix"\n'
        '[recipes.tuned]\nq_bits = 4\nq_method = "autoround"\n'
    )
    watchlist = read_watchlist(write(tmp_path, text))
    recipes = recipes_of(watchlist, watchlist.watch[0])
    assert recipes["seen"].options.calibration is not None
    for asked in recipes.values():
        assert Asked.from_json(asked.to_json()) == asked
        assert asked.hash == digest(asked.options.to_json())  # as ledgers have known them always
    assert len({asked.hash for asked in recipes.values()}) == 4


BY_HAND = {"gguf_file", "trust_remote_code", "map_by", "map_file", "model_file", "target"}
BY_HAND |= {"kv_quant_scheme", "kv_bits", "kv_group_size"}
"""What changes an output and has no key; docs/nightly.md says of each why."""
ELSEWHERE = {
    "hf_path": "organisations",
    "revision": "models",
    "quantize": "q_bits",
    "private": "private",
    "upload_repo": "names",
    "mlx_path": "state",
}
"""What a key of another name says."""
NOT_OF_THE_OUTPUT = {"card_template", "draft_for", "memory_limit", "no_validate", "overwrite"}
NOT_OF_THE_OUTPUT |= {"quiet", "shard", "stream", "version", "workers"}


def test_every_option_of_the_command_line_has_its_key():
    """A new option is in one of these sets, or this fails."""
    options = {one.name: one.opts[-1] for one in cli.params}
    keys = keys_of(WatchList)
    told = {name for name in options if name in keys} | ELSEWHERE.keys()
    assert set(ELSEWHERE.values()) <= keys
    assert sorted(options.keys() - told - BY_HAND - NOT_OF_THE_OUTPUT) == []
    assert sorted((BY_HAND | NOT_OF_THE_OUTPUT | ELSEWHERE.keys()) - options.keys()) == []
    assert told.isdisjoint(BY_HAND | NOT_OF_THE_OUTPUT)
    (section,) = re.findall(r"(?s)What has no key\..*?\n\n", DOC.read_text())
    assert sorted(re.findall(r"`(--[\w-]+)`", section)) == sorted(options[n] for n in BY_HAND)


def test_every_option_of_a_plan_has_its_key():
    """A recipe that says all it can differs from the default in every option."""
    keys = {
        "dtype": "float16",
        "q_bits": 3,
        "q_method": "autoround",
        "tuning_iterations": 7,
        "calibration_sequences": 3,
        "calibration_length": 64,
        "q_target_bpw": 4.5,
        "q_group_size": 32,
        "q_target_size": "4GB",
        "quant_predicate": "mixed_4_6",
        "kv_rotate_values": True,
        "dequantize": True,
        "mtp": True,
    }
    assert Recipe.model_fields.keys() - keys.keys() == {"q_mode", "adapter_path"}
    alone = [
        {"dtype", "dequantize", "kv_rotate_values", "mtp"},
        {"q_bits", "q_method", *(k for k in keys if k.startswith(("tuning", "calibration")))},
        {"q_target_bpw", "q_group_size"},
        {"q_target_size"},
        {"quant_predicate"},
    ]
    changed = set()
    for some in alone:
        recipe = Recipe(**{key: keys[key] for key in some})
        watchlist = WatchList(
            namespace="n", recipes={"own": recipe}, watch=[Watch(models=["a/b"], recipes=["own"])]
        )
        (asked,) = recipes_of(watchlist, watchlist.watch[0]).values()
        changed |= {f.name for f in fields(Options) if getattr(asked.options, f.name) != f.default}
        assert Asked.from_json(json.loads(json.dumps(asked.to_json()))) == asked
        assert asked.mtp == ("mtp" in some)
    assert {f.name for f in fields(Options)} - changed == {"target", "allocation"}


def test_plain_variants_are_plain_whatever_the_release_is(tmp_path):
    watchlist = read_watchlist(write(tmp_path, LEAST.replace('"4bit"', '"bf16", "4bit"')))
    recipes = recipes_of(watchlist, watchlist.watch[0])
    assert {name: one.options.dequantize for name, one in recipes.items()} == {
        "bf16": True,
        "4bit": False,
    }


@pytest.mark.parametrize(
    ("text", "names", "repo"),
    [
        (
            LEAST.replace('"4bit"', '"4bit", "8bit"').replace(
                "[[watch]]", 'names = "{model}-MLX"\n[[watch]]'
            ),
            "4bit and 8bit",
            "night/model-MLX",
        ),
        (
            OWN.replace('["own"]', '["own", "own-mtp"]')
            + "q_bits = 4\nmtp = true\n[recipes.own-mtp]\nq_bits = 8",
            "own and own-mtp",
            "night/model-own-mtp",
        ),
    ],
    ids=["names", "drafter"],
)
def test_two_outputs_do_not_share_a_repo(tmp_path, text, names, repo):
    assert problems(tmp_path, text) == [
        f"watch[0]: {names} would both be published as {repo}; rename one, or give names with "
        "{variant}"
    ]


def apart(one: str, other: str, filters: str = "") -> str:
    return (
        "namespace: night\nwatch:\n"
        f"  - {{{one}, recipes: [d]}}\n  - {{{other}, recipes: [d-mtp]{filters}}}\n"
        "recipes: {d: {q_bits: 8, mtp: true}, d-mtp: {q_bits: 4}}\n"
    )


@pytest.mark.parametrize(
    ("entries", "clash"),
    [
        (("models: [a/b]", "models: [a/b@main]"), True),
        (("organisations: [a]", "organisations: [a]"), True),
        (("organisations: [a]", "organisations: [a]", ", filters: {exclude: [x]}"), False),
        (("models: [a/b]", "models: [a/c]"), False),
    ],
)
def test_entries_that_follow_one_release_do_not_share_a_repo(tmp_path, entries, clash):
    path = write(tmp_path, apart(*entries), "watch.yaml")
    if not clash:
        assert len(read_watchlist(path).watch) == 2
        return
    with pytest.raises(UsageError, match=r"watch\[0\] and watch\[1\]: d and d-mtp would both be"):
        read_watchlist(path)


def test_a_worker_reads_a_list_whose_inputs_lie_elsewhere(tmp_path):
    data = 'calibration_data = "/no/text"\n[recipes.own]'
    text = OWN.replace("[recipes.own]", data) + 'q_bits = 4\nadapter_path = "/no/lora"'
    assert len(problems(tmp_path, text)) == 2
    read = read_watchlist(write(tmp_path, text), inputs=False)
    assert read.watch[0].calibration_data == Path("/no/text")


def with_folders(folder: str) -> str:
    """A watch list in which every key that names a folder or file names ``folder``."""
    data = f'calibration_data = "{folder}/text"\n[recipes.own]'
    text = OWN.replace("[recipes.own]", data) + f'q_bits = 4\nadapter_path = "{folder}/lora"\n'
    return f'state = "{folder}/state"\n{text}[fleet]\nshared = "{folder}/shared"\n'


def test_a_user_that_is_unknown_here_is_told(tmp_path):
    assert problems(tmp_path, with_folders("~nosuchuser")) == [
        "state: ~nosuchuser/state: this machine has no such user",
        "watch[0].calibration_data: ~nosuchuser/text: this machine has no such user",
        "recipes.own.adapter_path: ~nosuchuser/lora: this machine has no such user",
        "fleet.shared: ~nosuchuser/shared: this machine has no such user",
    ]


def test_folders_are_read_from_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = read_watchlist(write(tmp_path, with_folders("~/night")), inputs=False)
    assert read.state == tmp_path / "night" / "state"
    assert read.fleet.shared == tmp_path / "night" / "shared"


@pytest.mark.parametrize("name", ["{model.real}", "{model[0]}", "{model!r}", "{model:>9}", "{0}"])
def test_names_are_made_of_whole_words(tmp_path, name):
    (told,) = problems(tmp_path, f'names = "{name}{{model}}"\n{LEAST}')
    assert told.startswith(f"names: '{name}{{model}}' is not made of {{organisation}}, {{model}}, ")


ENDLESS = """
[budgets]
disk = "{nines}GB"
memory = {nines}
bandwidth = "{nines}MB/s"
[retries]
lease = "{nines}d"
patience = inf
"""


def test_quantities_without_end_are_refused(tmp_path):
    assert problems(tmp_path, LEAST + ENDLESS.format(nines="9" * 400)) == [
        "budgets.disk: is larger than any disk",
        "budgets.memory: must be less than or equal to 1000000000000000000",
        "budgets.bandwidth: is larger than any disk",
        "retries.patience: must be a finite number",
        "retries.lease: must be a finite number",
    ]


def test_inputs_that_the_system_refuses_are_told(tmp_path):
    name = f"/{'long' * 75}"
    told = problems(tmp_path, with_folders(name))
    assert told == [
        f"watch[0].calibration_data: {name}/text: File name too long",
        f"recipes.own.adapter_path: {name}/lora: File name too long",
    ]


MERGED = """
base: &b {x: 0, y: 1}
deep: [[[&a {<<: *b, x: 1}]]]
own: {<<: *a, z: 3}
"""


def test_yaml_with_merge_keys_is_read_as_it_is_meant():
    assert load(MERGED) == yaml.safe_load(MERGED)
    with pytest.raises(yaml.YAMLError, match=r"(?s)'z' is given twice.*line 4"):
        load(MERGED.replace("z: 3", "z: 3, z: 4"))
