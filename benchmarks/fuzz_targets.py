"""What is fuzzed: every reader of bytes that others wrote, each with an oracle of its own.

A target takes any bytes and returns; whatever it raises is a finding. A reader may refuse its
input with its own error and nothing else, in messages of bounded lines that can be printed, and
what it accepts must hold what its callers rely on. The same functions run under a coverage-guided
fuzzer (``python -m benchmarks.fuzz``) and, for a moment, in the tests.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import posixpath
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from arch_maps.config import start
from arch_maps.facts import Facts
from arch_maps.ops import sources
from converter.decode import decoded
from converter.errors import PlanError, UsageError
from converter.execute.journal import Journal
from converter.plan import Options, build_plan
from converter.plan.match import find_map, match_release
from converter.sidecars import choose_sidecars
from converter.source import Header, Source, TensorInfo, build_source, parse_header
from converter.source.header import fetch_header
from converter.source.index import parse_index, path_problem, select_weights, unlisted_problems
from converter.source.strict_json import parse_object
from quant.recipe import QuantSpec

ROOT: Final = Path(__file__).parents[1]
Target = Callable[[bytes], None]
MAX_LINE: Final = 4000
"""Characters of one problem: a message must not repeat a hostile file."""
_SCRATCH: Final = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())


def refused(error: PlanError) -> None:
    """Check what a reader says when it refuses: lines that can be printed, and not without end."""
    assert error.problems
    for problem in error.problems:
        assert len(problem) < MAX_LINE, f"a problem of {len(problem)} characters"
        assert problem.isprintable(), f"a problem that could forge lines: {problem!a}"


def _brief(text: str, *, start: str = "") -> None:
    assert len(text) < MAX_LINE, f"{len(text)} characters"
    assert text.startswith(start), text


def header(data: bytes) -> None:
    """A safetensors header: what is accepted, the format's own reader accepts and reads the same.

    The first byte says whether the rest is a whole file or the header's JSON; JSON gets a matching
    length, and as many data bytes as it asks for, give or take one.
    """
    if not data:
        return
    mode, rest = data[0], data[1:]
    if mode & 3 == 3:
        file = rest
    else:
        file = len(rest).to_bytes(8, "little") + rest + bytes(_asked(rest) + (mode & 3))
    try:
        if mode & 4:
            read = fetch_header(lambda first, last: file[first:last], len(file), "x")
        else:
            read = parse_header(file, len(file), "x")
    except PlanError as error:
        refused(error)
        return
    _agrees_with_the_format(file, read)


def _asked(text: bytes) -> int:
    """Data bytes that a header's JSON asks for, as far as a file of zeros is worth making."""
    try:
        entries = json.loads(text)
        named = [entry for name, entry in entries.items() if name[:2] != "__"]
        ends = [int(entry["data_offsets"][1]) for entry in named]
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return 0
    return min(max(ends, default=0), 1 << 16) if min(ends, default=0) >= 0 else 0


def _agrees_with_the_format(file: bytes, read: Header) -> None:
    safetensors: Any = import_module("safetensors")
    entries = safetensors.deserialize(file)
    theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in entries}
    ours = {name: (info.dtype, info.shape) for name, info in read.tensors.items()}
    assert theirs == ours, (theirs, ours)
    for info in read.tensors.values():
        assert 0 <= info.start <= info.stop <= len(file)


def index(data: bytes) -> None:
    """A shard index and a repo's file names: no accepted path leaves the folder."""
    at = data[0] % 64 if data else 0
    names = data[1 : 1 + at].decode("utf-8", "replace").split("\n")
    text = data[1 + at :]
    readers: tuple[Callable[[], Iterable[str]], ...] = (
        lambda: _selected(names),
        lambda: choose_sidecars(names),
        lambda: _shards(text, names),
    )
    for found in readers:
        try:
            for path in found():
                _stays_inside(path)
        except PlanError as error:
            refused(error)


def _selected(names: list[str]) -> Iterable[str]:
    """Of names that were looked at already, as those of a repo are when it is resolved."""
    return select_weights([name for name in names if path_problem(name) is None], "x").files


def _shards(text: bytes, names: list[str]) -> Iterable[str]:
    read = parse_index(text, "model.safetensors.index.json")
    unlisted_problems(read, names, "safetensors")
    headers = {name: Header(name, 8, "", {}, {}) for name in read.shards[:3]}
    try:
        build_source(where="x", config={}, headers=headers, index=read)
    except PlanError as error:
        refused(error)
    return read.shards


def _stays_inside(path: str) -> None:
    assert not posixpath.isabs(path), path
    assert "\0" not in path, path
    assert posixpath.normpath(posixpath.join("/folder", path)).startswith("/folder/"), path


def config(data: bytes) -> None:
    """config.json as text: what is accepted can be copied, hashed and written again as UTF-8."""
    try:
        read = parse_object(data, "config.json")
        copied = start(read)
    except PlanError as error:
        refused(error)
        return
    json.dumps(read, sort_keys=True)
    json.dumps(copied, ensure_ascii=False, indent=2).encode()


class Cursor:
    """Choices read off bytes, so that a fuzzer's mutations become mutations of a document."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, limit: int) -> int:
        """A number in ``[0, limit)``; zeros once the bytes are used up."""
        width = 1 if limit <= 256 else 2
        taken = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(taken, "little") % limit


_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2, 3, 5, 7, 64, 96, 128, 1 << 16, 2**31 - 1, 2**31, 2**63),
    *(10**40, 0.0, -0.0, 0.5, 1.5, -2.5, 1e-300, 1e308, math.inf, math.nan, "", "x", "yarn"),
    *("default", "linear", "longrope", "llama3", "bfloat16", "full_attention", "sliding_attention"),
    *([], [0], [1, 2], [None], ["full_attention"], ["x"] * 3, [[]], [[0, 1], [2]], [1.5], [-1]),
    *({}, {"a": 1}, _YARN, {"rope_type": "longrope"}, {"__float__": "Infinity"}, {"__float__": []}),
    *({"type": None}, {"factor": "x"}, "a" * 500, "\ud800", [64] * 5000, {"0": {}}, "4" * 30),
)
_KEYS: Final = (
    *("quantization_config", "quantization", "rope_scaling", "rope_parameters", "text_config"),
    *("vision_config", "layer_types", "auto_map", "model_file", "tie_word_embeddings", "dtype"),
    *("torch_dtype", "head_dim", "num_key_value_heads", "sliding_window", "architectures"),
)
_METHODS: Final = (
    *("awq", "bitnet", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq"),
    *("modelopt", "modelopt_fp4", "mxfp4", "x"),
)
_SETTINGS: Final = (
    *("bits", "group_size", "desc_act", "sym", "zero_point", "version", "ignore", "config_groups"),
    *("weight_block_size", "modules_to_not_convert", "quant_algo", "quantization", "load_in_4bit"),
    *("bnb_4bit_quant_type", "format", "kv_cache_scheme", "exclude_modules", "activation_scheme"),
)


def plan(data: bytes) -> None:
    """A whole plan of a release whose config was changed in a few places.

    The first bytes choose one of the shipped examples; the tensors are those of its twin.
    """
    take = Cursor(data)
    names = _twins()
    read, tensors = _twin(names[take.below(len(names))])
    read = json.loads(json.dumps(read))
    for _ in range(1 + take.below(3)):
        _edit(read, take)
    recipe = (Options(), Options(quant=QuantSpec.make("affine", 4, 32)))[take.below(2)]
    try:
        text = json.dumps(read, ensure_ascii=bool(take.below(2))).encode("utf-8", "surrogatepass")
        settings = parse_object(text, "config.json")
        source = Source(
            root=None,
            kind="safetensors",
            tensors=tensors,
            config=settings,
            files={},
            weight_files=(),
        )
        view = decoded(source)
        match = match_release(view.source, find_map(view.source.config))
        made = build_plan(view.source, match, recipe, view=view)
    except PlanError as error:
        refused(error)
    except UsageError as error:
        _brief(str(error))
    else:
        json.dumps(made.to_json(), ensure_ascii=False).encode()


@cache
def _twins() -> tuple[str, ...]:
    from validate.twin import list_examples

    return list_examples()


@cache
def _twin(name: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    from validate.twin import load_example
    from validate.twin.families import family_of
    from validate.twin.shrink import shrink_config

    example = load_example(name)
    read = shrink_config(example, family_of(example["model_type"]))[0]
    arch = find_map(read)
    tensors: dict[str, TensorInfo] = {}
    for rule in arch.expand(Facts(read), arch.layouts[0]).rules:
        for leaf in sources(rule.expr):
            shape = tuple(map(int, leaf.shape))
            stop = 2 * math.prod(shape)
            tensors[leaf.name] = TensorInfo(leaf.name, "BF16", shape, "x", 0, stop)
    return read, tensors


def _edit(document: dict[str, Any], take: Cursor) -> None:
    """Change, delete or add one entry of a document, at any depth."""
    places = list(_places(document))
    holder, key = places[take.below(len(places))]
    kind = take.below(8)
    value = copy.deepcopy(_VALUES[take.below(len(_VALUES))])
    if kind == 0:
        del holder[key]
    elif kind == 1:
        inside = holder if isinstance(holder, dict) else document
        inside[_KEYS[take.below(len(_KEYS))]] = value
    elif kind == 2:
        method = _METHODS[take.below(len(_METHODS))]
        settings: dict[str, Any] = {"quant_method": method}
        for _ in range(take.below(4)):
            chosen = copy.deepcopy(_VALUES[take.below(len(_VALUES))])
            settings[_SETTINGS[take.below(len(_SETTINGS))]] = chosen
        document["quantization_config"] = settings
    elif kind == 3:
        other, name = places[take.below(len(places))]
        copied = other[name] if other is not holder else None
        holder[key] = json.loads(json.dumps(copied))
    else:
        holder[key] = value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(entries):
        yield value, key
        if isinstance(inner, dict) or (isinstance(inner, list) and len(inner) < 50):
            yield from _places(inner)


def card(data: bytes) -> None:
    """The front matter of somebody's model card: a card can always be written after it."""
    import yaml

    from model_cards.metadata import card_metadata, dump_front_matter, read_source_metadata

    text = data.decode("utf-8", "replace")
    read = read_source_metadata(f"---\n{text}\n---\n")
    made = card_metadata(
        read,
        base_model="a/b",
        base_revision="0" * 40,
        source_files=("LICENSE",),
        pipeline_tag="text-generation",
    )
    block = dump_front_matter(made)
    if len(block) < 20_000:  # yaml reads slowly
        assert yaml.safe_load(block[4:-4]) == made


def watchlist(data: bytes) -> None:
    """A watch list in TOML or YAML: read, or refused with lines that name the file.

    What it asks for is made of what the ledger keeps of it. Texts and adapters are not looked for,
    as by a worker: a fuzzer would read the disk.
    """
    from converter.batch.recipes import Asked, policy_of, recipes_of
    from converter.batch.watchlist import parse_watchlist

    if not data:
        return
    path = Path("w.toml" if data[0] & 1 else "w.yaml")
    try:
        read = parse_watchlist(path, data[1:].decode("utf-8", "replace"), inputs=False)
    except UsageError as error:
        first, *more = str(error).split(f"\n{path}: ")
        _brief(first, start=f"{path}: ")
        for line in more:
            _brief(line)
        return
    for entry in read.watch:
        json.dumps(policy_of(read, entry).to_json(), allow_nan=False)
        adapters = [read.recipes[name].adapter_path for name in entry.recipes]
        if entry.calibration_data is not None or any(adapters):
            continue
        try:
            made = recipes_of(read, entry)
        except UsageError as error:
            _brief(str(error), start="recipes.")
            continue
        for name, asked in made.items():
            stored = json.dumps(asked.to_json(), allow_nan=False)
            assert Asked.from_json(json.loads(stored)).hash == asked.hash, name
            assert read.target("a/b", name).startswith(f"{read.namespace}/"), name


def journal(data: bytes) -> None:
    """A journal that a power cut left in any state: what it says is units, or nothing."""
    folder = _folder()
    identity = {"plan": "x"}
    start_line = b'{"plan": "x"}\n' if data[:1] != b"\0" else b""
    (folder / ".journal.jsonl").write_bytes(start_line + data[1:])
    opened = Journal(folder, identity)
    try:
        assert all(type(unit) is int for unit in opened.done)
        opened.record([7])
    finally:
        opened.close()
    again = Journal(folder, identity)
    again.close()
    assert again.done == opened.done


def pickle(data: bytes) -> None:
    """A PyTorch checkpoint: nothing is started, opened for writing or connected while it is read.

    The first byte says whether the rest is the whole file or the pickle inside an archive.
    """
    from converter.source import pickle_child, pickles

    if not data:
        return
    folder = _folder()
    path, scratch = folder / "x.bin", folder / "0.safetensors"
    path.write_bytes(_archive(data[1:]) if data[0] & 1 else data[1:])
    scratch.unlink(missing_ok=True)
    size = path.stat().st_size
    with _watched(allowed=str(folder)):
        try:
            answer = pickle_child.inspect(path, scratch)
        except pickle_child.Refused as error:
            _brief(str(error))
            return
        except Exception as error:  # what main() makes the file's problem
            _brief(pickle_child.explain(error))
            return
    try:  # the child is not believed: an archive may lie about where its entries are
        read = pickles._header("x.bin", path, answer, {})
    except PlanError as error:
        refused(error)
        return
    for info in read.tensors.values():
        assert 0 <= info.start <= info.stop, info
        assert info.file != "x.bin" or info.stop <= size, info


def _archive(text: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
        made.writestr("archive/data.pkl", text)
        made.writestr("archive/byteorder", "little")
        for number in range(3):
            made.writestr(f"archive/data/{number}", bytes(64))
        made.writestr("archive/version", "3\n")
    return out.getvalue()


_FORBIDDEN: Final = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.remove", "os.rename"),
    *("os.putenv", "os.chmod", "os.symlink", "os.link", "os.mkdir", "os.rmdir", "os.kill"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "shutil.rmtree"),
    *("ctypes.dlopen", "urllib.Request", "webbrowser.open", "pty.spawn"),
)
_watching: list[str] = []


@cache
def _install_hook() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _watching:
            return
        written = False
        if event == "open" and not isinstance(arguments[0], int):  # a descriptor is open already
            written = bool(arguments[2] & 3) and not str(arguments[0]).startswith(_watching[0])
        if event in _FORBIDDEN or written:
            raise Escaped(event, arguments)

    sys.addaudithook(hook)


class Escaped(BaseException):
    """A file made the reader do something; no handler of ordinary errors catches it."""


@contextmanager
def _watched(*, allowed: str) -> Iterator[None]:
    _install_hook()
    _watching.append(allowed)
    try:
        yield
    finally:
        _watching.pop()


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=_SCRATCH))


def gguf(data: bytes) -> None:
    """A GGUF file: what is accepted lies behind its head, in the file, and no byte is read twice.

    The first two bytes say how many zeros follow the rest, in units of 64.
    """
    from converter.source import gguf as source
    from converter.source import gguf_child

    file = data[2:] + bytes(64 * int.from_bytes(data[:2], "little"))
    try:
        answer = gguf_child.inspect(gguf_child.Cursor(file, len(file)))
    except gguf_child.Refused as error:
        _brief(str(error))
        return
    answer = json.loads(json.dumps(answer))  # as it comes from the child
    head = source.Head(file="x.gguf", size=len(file), digest="", **answer)
    try:
        read = source.gguf_source(
            [head], where="x", stated=None, read=lambda name, start, stop: file[start:stop]
        )
        decoded(read)
    except PlanError as error:
        refused(error)
        return
    end = head.end
    for info in sorted(read.tensors.values(), key=lambda info: info.start):
        assert end <= info.start <= info.stop <= len(file), info
        end = info.stop


TARGETS: Final[dict[str, Target]] = {
    "header": header,
    "index": index,
    "config": config,
    "plan": plan,
    "card": card,
    "watchlist": watchlist,
    "journal": journal,
    "pickle": pickle,
    "gguf": gguf,
}
