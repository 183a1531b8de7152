"""Coverage-guided fuzzing of every reader: ``python -m benchmarks.fuzz`` (needs atheris).

One process at a time runs each target of ``benchmarks.fuzz_targets`` for its share of executions,
in slices, from seeds taken from the examples and fixtures of this repository, with a dictionary of
the formats' own words. A finding is whatever a target raises, an execution of more than
``TIMEOUT_S`` seconds, or more than ``MEMORY`` bytes of address space beyond what the imports took;
the input is kept and the slice is not counted. Counts go to ``benchmarks/fuzz.json``.

atheris has wheels for some versions of Python only, so it may live in an environment of its own:
``--site DIR`` adds another environment's packages behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "fuzz.json"
PAGE: Final = ROOT / "benchmarks" / "fuzz.md"
TIMEOUT_S: Final = 10
MEMORY: Final = 512 << 20
MAX_INPUT: Final = 4096
SHARES: Final = {
    "header": 6_000_000,
    "config": 5_000_000,
    "index": 1_000_000,
    "journal": 400_000,
    "watchlist": 60_000,
    "card": 60_000,
    "pickle": 100_000,
    "plan": 80_000,
    "gguf": 300_000,
}
"""Executions of each target; those that parse little are fast, a whole plan takes milliseconds."""
_SLICES: Final = 10
_WORDS: Final = (
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F16"', '"BF16"', '"F8_E4M3"'),
    *('"U8"', '"I64"', '"F4"', "18446744073709551615", "9223372036854775808", "-0", "-1", "1e3"),
    *('{"', '":', "[0,0]", "[]", "{}", "null", "true", "NaN", "Infinity", "\\ud800", "\\u0000"),
    *('"weight_map"', '"metadata"', '"total_size"', "model-00001-of-00002.safetensors", "../", "/"),
    *("model.safetensors", ".bin", "C:", "..\\", "pytorch_model.bin", "config.json", "\n"),
    *('{"__float__": "NaN"}', '"quantization_config"', '"rope_scaling"', "[[[[", "&a", "*a", "<<"),
    *("---", "license:", "tags:", "!!python/object:", "namespace", "watch", "[[watch]]", "= "),
    *("2001-01-01", "0x", "1_0", "80GB", "12h", "${HOME}", "- ", ": "),
    *("GGUF", "general.architecture", "general.alignment", ".expert_count", ".rope.scaling.type"),
    *("blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "qwen3moe"),
)


_INTRODUCTION: Final = """\
# Fuzzing

`python -m benchmarks.fuzz` runs every reader of bytes that others wrote under
[atheris](https://github.com/google/atheris) (libFuzzer), guided by coverage of this project's own
code and of the JSON, YAML and TOML readers in Python. A finding is anything but the reader's own
refusal: another error, something accepted that the format's own reader rejects or reads otherwise,
a path that leaves its folder, a config that cannot be written again, a message without bounds, an
execution of more than 10 s, or more than 512 MiB beyond what the imports took. `benchmarks/fuzz.py`
has the limits and seeds, `benchmarks/fuzz_targets.py` what each target demands. Slices that ended
with a finding are not counted; seconds are of a busy machine.
"""
_FOUND: Final = """\
What was found, and has a regression test in `tests/test_hostile_input.py`:

- a config with lone surrogates, or nested deeper than it can be copied, failed after planning;
- a number of experts of two thousand millions was expanded in memory;
- settings of another kind than a map computes with ended in an internal error (two in a hundred
  mutated configs);
- `{"__float__": ...}` that is no number, at any depth or as the whole config;
- messages repeated a hostile value at any length;
- near names were looked for among so many missing and surplus tensors that it took minutes;
- a journal line of `[Infinity]`, and dates, numbers and depths that end YAML's and TOML's own
  parsers, were not refused;
- expressions in a quantization config could be made to backtrack for ever.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="Default: all.")
    parser.add_argument("--scale", type=float, default=1.0, help="Of every share of executions.")
    parser.add_argument("--site", action="append", default=[], help="More packages to import from.")
    parser.add_argument("--corpus", type=Path, default=ROOT / ".fuzz", help="Kept between runs.")
    parser.add_argument("--seconds", type=float, help="Begin no slice after this long.")
    parser.add_argument("--longest", type=int, default=MAX_INPUT, help="Bytes of an input.")
    parser.add_argument("--child", nargs=2, metavar=("TARGET", "RUNS"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    sys.path += given.site
    if given.child:
        return _child(given.child[0], int(given.child[1]), given.corpus, given.longest)
    deadline = time.monotonic() + given.seconds if given.seconds else None
    findings = 0
    for _ in range(_SLICES):  # all targets advance together, so that an early end is fair
        for name in given.targets or SHARES:
            if deadline is not None and time.monotonic() > deadline:
                return 1 if findings else 0
            runs = int(SHARES[name] * given.scale / _SLICES)
            findings += _slice(name, runs, given)
    return 1 if findings else 0


def _slice(name: str, runs: int, given: argparse.Namespace) -> int:
    """Run a slice in a process of its own and record it; 1 for a finding."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--corpus", str(given.corpus)]
    command += ["--longest", str(given.longest)]
    for site in given.site:
        command += ["--site", site]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--child", name, str(runs)],
        cwd=ROOT,
        env={**os.environ, "FUZZ_SEED": str(int(time.time()))},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = done.stderr
    executed = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    edges = re.findall(r"cov: (\d+)", said)
    finding = done.returncode != 0 or not executed
    if finding:
        (given.corpus / f"{name}.log").write_text(said[-20_000:], encoding="utf-8")
    _record(
        name,
        executions=0 if finding else int(executed[-1]),
        edges=int(edges[-1]) if edges else 0,
        seconds=time.monotonic() - began,
        findings=int(finding),
    )
    print(f"{name}: {runs} executions, edges {edges[-1:]}, finding: {finding}", flush=True)
    return int(finding)


def _record(name: str, *, executions: int, edges: int, seconds: float, findings: int) -> None:
    data: dict[str, Any] = {"targets": {}}
    if RESULTS.is_file():
        data = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = data["targets"].setdefault(
        name, {"executions": 0, "edges": 0, "seconds": 0, "findings": 0}
    )
    found["executions"] += executions
    found["edges"] = max(found["edges"], edges)
    found["seconds"] = round(found["seconds"] + seconds)
    found["findings"] += findings
    targets = data["targets"].values()
    data["executions"] = sum(target["executions"] for target in targets)
    data["limits"] = {"seconds": TIMEOUT_S, "bytes": MEMORY, "input": MAX_INPUT}
    data["python"] = platform.python_version()
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


def page(data: dict[str, Any]) -> str:
    """The counts as a page."""
    rows = [
        f"| `{name}` | {found['executions']:,} | {found['edges']:,} | {found['seconds']:,} |"
        for name, found in data["targets"].items()
    ]
    total = f"| **all** | **{data['executions']:,}** | | |"
    head = "| target | executions without a finding | edges | seconds |\n|---|---|---|---|"
    return "\n".join([_INTRODUCTION, head, *rows, total, "", _FOUND])


def _child(name: str, runs: int, corpus: Path, longest: int) -> int:
    import atheris

    own = ("converter", "arch_maps", "model_cards", "quant.recipe", "json", "yaml", "tomllib")
    with atheris.instrument_imports(include=list(own)):
        from benchmarks.fuzz_targets import TARGETS, Escaped

        target = TARGETS[name]
        for seed in _seeds(name):  # whatever is imported late is imported now
            target(seed)
    folder = corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(_seeds(name)):
        (folder / f"seed-{number}").write_bytes(seed)
    words = corpus / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in _WORDS), encoding="ascii")
    _bound_memory()

    def once(data: bytes) -> None:
        try:
            target(data)
        except Escaped as error:
            raise AssertionError(f"escaped: {error.args}") from error

    options = [f"-runs={runs}", f"-timeout={TIMEOUT_S}", f"-max_len={longest}"]
    options += [f"-dict={words}", f"-artifact_prefix={corpus}/{name}-", "-print_final_stats=1"]
    options += [f"-seed={os.environ.get('FUZZ_SEED', '1')}", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, str(folder)], once)
    atheris.Fuzz()
    return 0


def _bound_memory() -> None:
    """Bound the address space to what is used now and ``MEMORY`` more."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def _seeds(name: str) -> Iterator[bytes]:
    """Real inputs of a target, no longer than an input may be."""
    makers = {
        "header": _headers,
        "index": _indexes,
        "config": _configs,
        "plan": _choices,
        "card": _cards,
        "watchlist": _lists,
        "journal": lambda: [b"\1[0,1]\n[2]\n", b"\0{}\n[0]\n", b"\1[0,1]\n[2"],
        "pickle": _pickles,
        "gguf": _ggufs,
    }
    return (seed[:MAX_INPUT] for seed in makers[name]())


def _headers() -> Iterator[bytes]:
    for path in sorted((ROOT / "tests" / "fixtures" / "quantized").glob("*.safetensors")):
        file = path.read_bytes()
        yield b"\0" + file[8 : 8 + int.from_bytes(file[:8], "little")]
    yield b'\4{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    yield b'\1{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    yield b'\3\x08\0\0\0\0\0\0\0{"a":{}}'


def _indexes() -> Iterator[bytes]:
    names = b"model-00001-of-00002.safetensors\nconfig.json"
    yield (
        bytes([len(names)])
        + names
        + (
            b'{"metadata":{"total_size":8},"weight_map":{"a":"model-00001-of-00002.safetensors",'
            b'"b":"sub/model-00002-of-00002.safetensors"}}'
        )
    )
    yield b'\x0bmodel.bin\nx{"weight_map":{"a":"../x.safetensors"}}'


def _configs() -> Iterator[bytes]:
    for path in sorted((ROOT / "arch_maps" / "examples").glob("*/config.json")):
        yield path.read_bytes()[:MAX_INPUT]


def _choices() -> Iterator[bytes]:
    for number in range(200):
        yield bytes([number, number % 3, *range(number, number + 8)][:10])


def _cards() -> Iterator[bytes]:
    yield b"license: apache-2.0\ntags: [a, b]\nlanguage:\n- en\npipeline_tag: text-generation\n"
    yield b"license: other\nlicense_name: x\nlicense_link: LICENSE\ndatasets: a/b\nwidget: []\n"


def _lists() -> Iterator[bytes]:
    text = (ROOT / "docs" / "nightly.md").read_text(encoding="utf-8")
    for kind, block in re.findall(r"```(toml|yaml)\n(.*?)```", text, re.DOTALL):
        block = re.sub(r"\$\{\w+\}", "${HOME}", block)  # which every environment has
        yield (b"\1" if kind == "toml" else b"\0") + block.encode()
    yield b"\0namespace: a\nwatch:\n- models: [a/b]\n  variants: [4bit]\n"
    yield (
        b'\1namespace="a"\nstate="~/s"\nnames="{organisation}.{model}-{variant}"\n[fleet]\n'
        b'shared="~nobody/x"\nsplit="1GB"\n[[watch]]\norganisations=["b"]\nrecipes=["r","s"]\n'
        b'calibration_data="~/t"\n[recipes.r]\nadapter_path="~root/l"\nq_bits=4\nmtp=true\n'
        b'[recipes.s]\nq_mode="mxfp4"\nq_method="search"\nkv_rotate_values=true\n'
    )
    yield (
        b"\0namespace: a\nwatch:\n- models: [a/b]\n  recipes: [r, s, t, u]\nrecipes:\n"
        b"  r: {q_bits: 4, q_method: autoround, tuning_iterations: 9, calibration_length: 8}\n"
        b"  s: {q_target_size: 4.2GB, q_group_size: 32, calibration_sequences: 2}\n"
        b"  t: {q_target_bpw: 4.5, q_method: imatrix, dtype: float16}\n"
        b"  u: {dequantize: true, dtype: bfloat16}\n"
    )


def _ggufs() -> Iterator[bytes]:
    """Heads of one layer, and how many zeros of data belong to each."""
    for architecture, kind in (("llama", "F32"), ("qwen3moe", "Q8_0"), ("gemma", "F16")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.gguf"
            _write_gguf(path, architecture, kind)
            file = path.read_bytes()
        zeros = (len(file) - len(file.rstrip(b"\0"))) // 64
        yield zeros.to_bytes(2, "little") + file[: len(file) - 64 * zeros]


def _write_gguf(path: Path, architecture: str, kind: str) -> None:
    import gguf
    import numpy as np

    experts = architecture == "qwen3moe"
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (64, 64), "output_norm": (64,)}
    shapes |= {f"blk.0.{name}_norm": (64,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    for name in ("gate", "up", "down"):
        shapes[f"blk.0.ffn_{name}{'_exps' if experts else ''}"] = (*([2] * experts), 64, 64)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_expert_feed_forward_length(64)
    writer.add_tokenizer_model("gpt2")
    for name, shape in shapes.items():
        stored = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind]
        blocks = gguf.quantize(np.zeros(shape, np.float32), stored)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pickles() -> Iterator[bytes]:
    """Checkpoints, whole and as the pickle within, and pickles that call."""
    import io
    import pickle
    import zipfile

    import torch

    for value in (
        {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16).t()},
        {"state_dict": {"w": torch.arange(6).reshape(2, 3).t()}},
        {"a": torch.nn.Parameter(torch.zeros(2))},
    ):
        for zipped in (True, False):
            out = io.BytesIO()
            torch.save(value, out, _use_new_zipfile_serialization=zipped)
            if len(out.getvalue()) <= MAX_INPUT:
                yield b"\0" + out.getvalue()
            if zipped:
                with zipfile.ZipFile(out) as archive:
                    name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                    yield b"\1" + archive.read(name)
    yield b"\1" + pickle.dumps({"a": [1, 2.0, "x", None, (True,)]}, 2)
    yield b"\1cos\nsystem\n(S'true'\ntR."
    yield b"\1c__builtin__\neval\n(S'1'\ntR."


if __name__ == "__main__":
    sys.exit(main())
