"""A source: what a release holds, checked across its files, before any tensor is read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converter.errors import PlanError
from converter.source.header import Header, TensorInfo, quote
from converter.source.index import Kind, WeightIndex, case_collisions
from converter.source.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A weight file: its path (None while remote), size in bytes and sha256 of its header."""

    path: Path | None
    size: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a GGUF file holds a tensor whose name and shape are the release's already."""

    kind: str
    """GGML's name of its type."""
    inside: str
    """Its name in the file."""
    shape: tuple[int, ...]
    head_rows: int = 0
    """Rows of a head whose halves are interleaved; 0 where rows are as they were."""
    offset: float = 0.0
    """What was added to every value."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A release: config, tensors by name, and the weight files they lie in."""

    root: Path | None
    kind: Kind
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    files: Mapping[str, SourceFile]
    weight_files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    mlx: str | None = None
    """What shows that this is an MLX checkpoint already, None for a torch release."""
    gguf: Mapping[str, Stored] = field(default_factory=dict)
    """What a GGUF file says of each tensor; empty for other releases."""
    gguf_drops: Mapping[str, str] = field(default_factory=dict)
    """Its tensors that nothing needs, and why."""
    scratch: object = None
    """Keeps unpacked copies of pickled tensors alive as long as the source."""
    remote: Callable[[Mapping[str, TensorInfo]], Reader] | None = None
    """Opens a reader of weight files that stay where they are; None where they must be local."""

    def open(self) -> Reader:
        """A reader of the tensors' bytes; every weight file must be local or streamed."""
        if self.remote is not None:
            return self.remote(self.tensors)
        remote = [name for name, file in self.files.items() if file.path is None]
        assert not remote, f"not downloaded: {remote}"
        files = {name: (f.path, f.size) for name, f in self.files.items() if f.path is not None}
        return Reader(self.tensors, files, scratch=self.scratch)

    def located(self, root: Path) -> "Source":
        """The same source once its weight files have been downloaded under ``root``."""
        files = {name: replace(file, path=root / name) for name, file in self.files.items()}
        return replace(self, root=root, files=files)

    def fingerprint(self) -> dict[str, tuple[str, int]]:
        """Each weight file's header sha256 and size: a cheap identity without reading tensors."""
        return {
            name: (self.files[name].digest, self.files[name].size) for name in self.weight_files
        }


def build_source(
    *,
    where: str,
    config: dict[str, Any],
    headers: Mapping[str, Header],
    index: WeightIndex | None = None,
    kind: Kind = "safetensors",
    root: Path | None = None,
    paths: Mapping[str, Path] | None = None,
    notes: Iterable[str] = (),
    problems: Iterable[str] = (),
    broken: Collection[str] = (),
    allow_mlx: bool = False,
) -> Source:
    """A source from checked headers alone, local or remote; ``where`` names it in errors.

    ``headers`` holds the shards of ``index`` that exist, or the single file when there is no
    index. ``problems`` were found on the way; files in ``broken`` are among them and not
    reported again. Raises PlanError with those and every disagreement of index and shards.
    """
    problems = [*problems, *case_collisions(headers)]
    found: dict[str, TensorInfo] = {}
    for _, header in sorted(headers.items()):
        for name, info in header.tensors.items():
            found.setdefault(name, info)
    if len(found) < sum(len(header.tensors) for header in headers.values()):
        problems += _shared(headers)
    if index is not None:
        problems += _index_problems(index, headers, found, broken)
    if not found and not problems:
        problems.append(f"{where}: no tensors in {', '.join(sorted(headers)) or 'any file'}")
    reason = mlx_reason(config, headers)
    if reason is not None and not allow_mlx:
        problems.append(
            f"{where}: already an MLX checkpoint ({reason}); give the original release, or use "
            "-d / --to torch to convert this one back"
        )
    if problems:
        raise PlanError(problems)
    tensors = {name: found[name] for name in sorted(found)}
    local = paths or {}
    files = {
        file: SourceFile(path=local.get(file), size=header.size, digest=header.digest)
        for file, header in sorted(headers.items())
    }
    return Source(
        root=root,
        kind=kind,
        tensors=tensors,
        config=config,
        files=files,
        weight_files=tuple(files),
        notes=tuple(notes),
        mlx=reason,
    )


QUANT_CONFIG = "hf_quant_config.json"
"""Where NVIDIA ModelOpt keeps the quantization settings of a release."""


def with_quant_config(config: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the settings ``found`` in ``hf_quant_config.json``, if it has none itself."""
    if "quantization_config" in config:
        return config
    return {**config, "quantization_config": {**found, "quant_method": "modelopt"}}


def mlx_reason(config: Mapping[str, Any], headers: Mapping[str, Header]) -> str | None:
    """What shows that a checkpoint is in MLX format, or None."""
    for file, header in sorted(headers.items()):
        if header.metadata.get("format") == "mlx":
            return f"{file} says format: mlx"
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and ({"mode", "group_size"} & quantization.keys()):
        for header in headers.values():
            if any(name.endswith(".scales") for name in header.tensors):
                return "config.json has MLX quantization settings and the weights have .scales"
    return None


def _shared(headers: Mapping[str, Header]) -> list[str]:
    """The problems of tensors that several files hold."""
    owners: dict[str, list[str]] = {}
    for file, header in sorted(headers.items()):
        for name in header.tensors:
            owners.setdefault(name, []).append(file)
    return [
        f"{quote(name)}: in more than one shard: {', '.join(files)}"
        for name, files in sorted(owners.items())
        if len(files) > 1
    ]


def _index_problems(
    index: WeightIndex,
    headers: Mapping[str, Header],
    found: Mapping[str, TensorInfo],
    broken: Collection[str],
) -> list[str]:
    if index.weight_map == {name: info.file for name, info in found.items()}:
        return []
    problems = []
    missing: dict[str, int] = {}
    for name, shard in index.weight_map.items():
        if shard in broken:
            continue
        if shard not in headers:
            missing[shard] = missing.get(shard, 0) + 1
        elif name not in headers[shard].tensors:
            elsewhere = f"; it is in {found[name].file}" if name in found else ""
            problems.append(f"{index.file}: {quote(name)}: not in {quote(shard)}{elsewhere}")
    problems = [
        f"{index.file}: shard {quote(shard)} is missing ({count} tensors)"
        for shard, count in sorted(missing.items())
    ] + problems
    problems += [
        f"{info.file}: {quote(name)}: not listed in {index.file}"
        for name, info in found.items()
        if name not in index.weight_map
    ]
    return problems
