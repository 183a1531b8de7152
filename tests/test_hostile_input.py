"""Input made to exhaust, confuse or crash a reader: refused in a moment, in a bounded line."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from release_helpers import LLAMA, llama_tensors, status, write_release

from arch_maps.rules import Kind, Mount, Tensors
from benchmarks import fuzz, fuzz_targets
from converter.batch.watchlist import read_watchlist
from converter.cli.errors import run
from converter.config_errors import config_errors
from converter.decode import patterns
from converter.decode.build import name_matcher
from converter.decode.patterns import pattern_problem
from converter.errors import MAX_PROBLEM, ConvertError, PlanError, UsageError
from converter.execute.journal import Journal
from converter.plan.match import disagreements
from converter.release import open_release
from converter.source import TensorInfo, build_source, parse_header, parse_index
from converter.source.strict_json import parse_object
from converter.staging import running_hub

# What coverage-guided fuzzing found, and what it would have found.
HOSTILE_CONFIGS = {
    "lone surrogate": ('{"a": "\\ud800"}', "lone surrogate"),
    "surrogate as a key": ('{"\\udfff": 1}', "lone surrogate"),
    "nested": ('{"a":' + "[" * 65 + "]" * 65 + "}", "nested too deeply"),
    "nested beyond the parser": ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "not JSON"),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_config_that_could_not_be_written_again(case):
    text, message = HOSTILE_CONFIGS[case]
    with pytest.raises(PlanError, match=message):
        parse_object(text.encode(), "config.json")


def test_text_about_surrogates_and_pairs_of_them_pass():
    text = rb'{"a": "\\ud800", "b": "\ud83d\ude00", "c": "\\\\ud800 is no character"}'
    assert parse_object(text, "x")["b"] == "\U0001f600"
    assert parse_object(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", "x")


def refused_config(tmp_path, capsys, **changes):
    source = write_release(tmp_path / "in", LLAMA | changes, llama_tensors(LLAMA))
    started = time.monotonic()
    code = status("--hf-path", source, "--mlx-path", tmp_path / "out", "--no-validate", "--quiet")
    said = capsys.readouterr().err
    assert code == 3, said
    assert "internal error" not in said
    assert max(map(len, said.splitlines())) < MAX_PROBLEM + 100
    assert time.monotonic() - started < 20
    return said


MOE = {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 2**31 - 1}


def test_hostile_number_of_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("arch_maps.rules.MAX_TENSORS", 10_000)
    assert "a release of more than 10,000 tensors" in refused_config(tmp_path, capsys, **MOE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": [64] * 5000}, "must be a positive integer"),
        ({"hidden_size": "\x1b[31m" + "4" * 9000}, "must be a positive integer"),
        ({"model_type": "x" * 9000}, "no map for model_type"),
        ({"quantization_config": {"quant_method": "gptq", "bits": {}}}, "config.json"),
        ({"quantization_config": {"quant_method": ["x"]}}, "is quantized with"),
    ],
)
def test_config_values_that_no_release_has(tmp_path, capsys, changes, message):
    assert message in refused_config(tmp_path, capsys, **changes)


def test_a_value_of_another_kind_names_the_place_that_could_not_use_it(tmp_path, capsys):
    said = refused_config(tmp_path, capsys, model_type="mimo", num_nextn_predict_layers=[1])
    assert "a setting has a value that the map for mimo cannot use: TypeError" in said
    assert "arch_maps/models/mimo.py, line" in said


@pytest.mark.parametrize(
    ("module", "file", "shown"),
    [
        ("arch_maps.models.mimo", "arch_maps/models/mimo.py", "arch_maps/models/mimo.py"),
        ("map_files.mine", "mine.py", "mine.py"),
        ("elsewhere", "elsewhere/sizes.py", "numbers.py"),
    ],
)
def test_the_place_is_this_programs_wherever_it_is_installed(module, file, shown):
    """Not that of a library it calls, which lies in the same folder."""
    installed = "/opt/python/site-packages"
    library = {"__name__": "numbers"}
    code = "def half(value):\n    return value / 2\n"
    exec(compile(code, f"{installed}/numbers.py", "exec"), library)
    own = {"__name__": module, "half": library["half"]}
    exec(compile("\ndef size():\n    return half([])\n", f"{installed}/{file}", "exec"), own)
    with pytest.raises(PlanError, match=rf"\({shown}, line [23]\)"), config_errors("the map"):
        own["size"]()


def test_of_a_map_file_the_place_is_in_the_file(tmp_path, capsys):
    source = write_release(tmp_path / "in", LLAMA, llama_tensors(LLAMA))
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom arch_maps.registry import find\n\n"
        "def config(given, facts):\n    return given['vocab_size'].items()\n\n"
        "MAP = replace(find('llama'), config=config)\n"
    )
    assert status("plan", "--hf-path", source, "--map-file", tmp_path / "mine.py") == 3
    assert "(mine.py, line 5)" in capsys.readouterr().err


def test_tagged_floats_are_only_those_that_transformers_writes():
    from arch_maps.config import start

    read = {"a": {"__float__": "Infinity"}, "b": {"__float__": []}, "c": [{"__float__": "1e"}]}
    assert start(read) == read | {"a": float("inf")}
    assert start({"__float__": "NaN"}) == {"__float__": "NaN"}


@pytest.mark.parametrize(("count", "hinted"), [(5, True), (150, False)])
def test_near_names_are_looked_for_among_few(count, hinted):
    """Thousands that are missing, compared with hundreds that are surplus, take minutes."""
    tensors = Tensors()
    for number in range(count):
        Mount(tensors).tensor(f"layers.{number}.weight", 2, kind=Kind.NORM)
    have = {
        name: TensorInfo(name, "F32", (2,), "x", 0, 8)
        for name in (f"layer.{number}.weight" for number in range(count))
    }
    problems = disagreements(have, tensors)
    assert len(problems) == 2 * count
    assert all(("did you mean" in problem) == hinted for problem in problems)


@pytest.mark.parametrize(
    "text",
    [
        *("(a|aa)+$", "(a+)+$", "(.*a){9}", r"(\w+)\1", ".*" * 5 + "x"),
        *("a?" * 24 + "c", "(?:a|aa)" * 24 + "c", "(?:a??b?" * 8 + ")" * 8),
        "(?:" + "(?:a|aa)" * 24 + "c|x)",
    ],
)
def test_expressions_that_could_take_forever_are_not_run(text):
    assert pattern_problem(text)


@pytest.mark.parametrize(
    "text",
    [
        ".*lm_head",
        r"model\.layers\.\d+\.mlp\.(gate|up)_proj",
        "^(?!.*down_proj).*",
        "(a|bc)?d",
        r".*layers\.\d+\..*(w[1-3]|gate_proj|up_proj|down_proj)$",
        r".*layers\.\d+\.mlp\.experts\.\d+\..*",
        r"^(model\.layers\.\d+\..*|.*visual\..*|lm_head)$",
        r"(?:.*\.)?layers\.\d+\.(self_attn|mlp)\.(qkv|gate_up)_proj$",
        r".*layers\.(?:[0-9]|[1-5][0-9])\..*experts\.\d+\.(?:gate|up|down)_proj$",
        r"(model\.)?(language_model\.)?layers\.\d+\.(self_attn|mlp)\..*",
    ],
)
def test_expressions_that_releases_have_are_run(text):
    assert pattern_problem(text) is None


def test_repetitions_one_after_another_are_bounded_in_time(monkeypatch):
    """As many names as a release may have, each as long as it may be: a minute, not an hour."""
    budget = patterns.Budget()
    slow, fast = (patterns.Expression(text, budget) for text in (".*a.*a.*ab", "lm_head"))
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.2)
    started = time.perf_counter()
    with pytest.raises(PlanError, match=r"^\.\*a\.\*a\.\*ab: takes too long to match"):
        any(slow.match("a" * 180 + str(number)) for number in range(10_000))
    assert time.perf_counter() - started < 10
    with pytest.raises(PlanError, match="is too long a name to match"):
        slow.match("a" * 257)
    with pytest.raises(PlanError, match="takes too long"):
        fast.match("model.norm")  # of the same config: the budget is of all that it brings
    assert not patterns.Expression(".*a.*a.*ab", patterns.Budget()).match("a"), "another's own"


def test_waiting_takes_nothing_of_the_budget(monkeypatch):
    """A machine that is busy with other things is no slow expression."""
    budget = patterns.Budget()
    found = patterns.Expression("a", budget)
    waits = SimpleNamespace(match=lambda *given: time.sleep(0.05), pattern="a")
    monkeypatch.setattr(found, "_pattern", waits)
    found.match("a")
    assert budget.spent == 0


def test_names_of_many_words_are_matched_in_a_moment():
    build = SimpleNamespace(problem=pytest.fail, budget=patterns.Budget())
    listed = ["lm_head", "model.visual", "mlp.gate", "x" * 200_000]
    matches = name_matcher(listed, build, where="ignore")
    started = time.process_time()
    assert not matches("a." * 200_000)
    assert matches("model.visual" + ".a" * 200_000)
    assert matches("a." * 200_000 + "mlp.gate")
    assert time.process_time() - started < 1
    for name in ("lm_head", "lm_head.x", "y.lm_head", "a.mlp.gate", "mlp.gate.a"):
        assert matches(name)
    for name in ("lm_head2", "xlm_head", "a.mlp.gate.b", "gate", "model", "mlp.gate_proj", ""):
        assert not matches(name)


def test_a_hundred_thousand_tensors(tmp_path):
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.w.weight" for i in range(100_000)]
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(names)
    }
    text = json.dumps(entries).encode()
    file = len(text).to_bytes(8, "little") + text
    shard = "model-00001-of-00001.safetensors"
    weight_map = json.dumps({"weight_map": dict.fromkeys(names, shard)}).encode()
    started = time.process_time()
    header = parse_header(file, len(file) + 100_000, shard)
    index = parse_index(weight_map, "model.safetensors.index.json")
    source = build_source(where="x", config={}, headers={shard: header}, index=index)
    assert len(source.tensors) == 100_000
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "line", [b"[Infinity]", b"[1.5]", b'["1"]', b"{}", b"7", b"[true]", b"[[1]]", b"[" * 5000]
)
def test_a_journal_line_that_was_never_written_ends_it(tmp_path, line):
    journal = Journal(tmp_path, {"plan": "x"})
    journal.record([1, 2])
    journal.close()
    with journal.path.open("ab") as file:
        file.write(line + b"\n[3]\n")
    again = Journal(tmp_path, {"plan": "x"})
    again.close()
    assert again.done == {1, 2}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.yaml", "a: 2001-99-99"),
        ("w.yaml", "[ " * 5000),
        ("w.yaml", "a: " + "9" * 5000),
        ("w.yaml", "a: !!timestamp x"),
        ("w.toml", "a = " + "[" * 5000),
        ("w.toml", "a = " + "9" * 5000),
    ],
)
def test_a_watch_list_that_breaks_its_parser(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=r"is not (YAML|TOML)") as told:
        read_watchlist(path)
    assert len(str(told.value)) < 1000


def test_a_config_of_many_gigabytes_is_not_fetched(tmp_path, monkeypatch):
    release = write_release(tmp_path / "in")
    with running_hub(tmp_path / "hub") as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=url, token="hf_staging")
        api.create_repo("acme/huge")
        api.upload_folder(repo_id="acme/huge", folder_path=release)
        monkeypatch.setattr("converter.release.MAX_JSON_BYTES", 100)
        with pytest.raises(PlanError, match=r"config\.json: has \d+ bytes, too large for what"):
            open_release("acme/huge", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_an_error_cannot_forge_lines_or_fill_the_screen():
    [problem] = PlanError(["a\x1b[31m\n\u202eb" + "c" * 10**6]).problems
    assert problem.isprintable()
    assert len(problem) < MAX_PROBLEM
    assert problem.startswith(r"a\x1b[31m\n\u202ebc")
    [problem] = PlanError(["\U000e0001" * 3000]).problems
    assert len(problem) < MAX_PROBLEM, "what is escaped is longer than what was cut"


def test_what_ends_a_command_cannot_steer_the_terminal(capsys):
    def command():
        raise ConvertError("model\x1b[2J.safetensors:\nis damaged")

    assert run(command) == ConvertError.exit_code
    assert capsys.readouterr().err == "model\\x1b[2J.safetensors:\nis damaged\n"


FAST = [name for name in fuzz_targets.TARGETS if name not in ("plan", "pickle")]


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_reader_refuses_or_reads_any_bytes(name, data):
    """A moment of what ``python -m benchmarks.fuzz`` does for millions of executions."""
    seeds = list(fuzz._seeds(name))
    seed = data.draw(st.sampled_from([b"", *seeds]))
    at = data.draw(st.integers(0, len(seed)))
    cut = data.draw(st.integers(0, 8))
    word = data.draw(st.sampled_from(fuzz._WORDS)).encode()
    piece = data.draw(st.one_of(st.just(word), st.binary(max_size=12)))
    fuzz_targets.TARGETS[name](seed[:at] + piece + seed[at + cut :])


@settings(max_examples=25, deadline=None)
@given(data=st.binary(min_size=4, max_size=24))
def test_every_plan_is_made_or_refused(data):
    fuzz_targets.plan(data)


def test_the_record_of_fuzzing_is_of_these_targets():
    """``benchmarks/fuzz.json`` says what was run; ten million executions, nothing left unmended."""
    record = json.loads((Path(fuzz.__file__).parent / "fuzz.json").read_text())
    assert record["targets"].keys() == fuzz_targets.TARGETS.keys() == fuzz.SHARES.keys()
    assert record["executions"] == sum(t["executions"] for t in record["targets"].values())
    assert record["executions"] >= 10_000_000
