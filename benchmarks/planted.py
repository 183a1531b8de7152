"""Faults planted into a loaded MLX model, as a wrong conversion would bring them along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arch_maps.rules import Kind, Rule
from validate.loaded import file_names, written_tensors
from validate.runtime import MlxRuntime
from validate.where.compare import Where

_SCALES = ("layer_scalar", "layer_scale", "gamma", "ls1", "lambda1", "layer_scale1")


@dataclass(frozen=True)
class Planted:
    """A fault: what it is called, the modules that it may rightly be blamed on, wrong values."""

    name: str
    modules: tuple[str, ...]
    values: dict[str, Any]
    """By their names in the files."""


class Site:
    """The parameters of a loaded model by their names in the files."""

    def __init__(self, runtime: MlxRuntime, folder: Path) -> None:
        self.model = runtime.model
        paths = list(runtime.parameters())
        name_of = file_names(written_tensors(folder), runtime.parameters())
        self.paths = {name_of(path): path for path in paths}
        self.values = dict(runtime.parameters())

    def module(self, target: str) -> str:
        return self.paths[target].rpartition(".")[0]

    def plant(self, fault: Planted) -> None:
        self._put(fault.values)

    def mend(self, fault: Planted) -> None:
        self._put({target: self.get(target) for target in fault.values})

    def _put(self, values: Mapping[str, Any]) -> None:
        from mlx.utils import tree_unflatten

        named = [(self.paths[target], value) for target, value in values.items()]
        self.model.update(tree_unflatten(named))

    def get(self, target: str) -> Any:
        return self.values[self.paths[target]]


def faults(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    """One fault of each sort that the type has a place for, in the middle of its text part."""
    text = [r for r in rules if r.part == "text" and r.target in site.paths]
    yield from _swapped(site, text)
    yield from _norm(site, text)
    yield from _flipped(site, text)
    yield from _expert(site, text)
    yield from _scale(site, text)


def _middle(found: list[Rule]) -> list[Rule]:
    return found[len(found) // 2 :][:1]


def _swapped(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    targets = {rule.target for rule in rules}
    queries = [r for r in rules if r.target.endswith(".q_proj.weight")]
    queries = [r for r in queries if r.target.replace(".q_proj.", ".k_proj.") in targets]
    for rule in _middle(queries):
        import mlx.core as mx

        other = rule.target.replace(".q_proj.", ".k_proj.")
        q, k = site.get(rule.target), site.get(other)
        rows = min(len(q), len(k))

        swapped = {
            rule.target: mx.concatenate([k[:rows], q[rows:]]),
            other: mx.concatenate([q[:rows], k[rows:]]),
        }
        yield Planted("swapped q/k", (site.module(rule.target), site.module(other)), swapped)


def _norm(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    norms = [r for r in rules if r.kind is Kind.NORM and r.target.endswith("layernorm.weight")]
    norms = norms or [r for r in rules if r.kind is Kind.NORM and r.target.endswith(".weight")]
    for rule in _middle(norms):
        value = site.get(rule.target)
        yield Planted(
            "norm off by one",
            (site.module(rule.target),),
            {rule.target: value + 1},
        )


def _flipped(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    dense = [
        r
        for r in rules
        if r.kind is Kind.LINEAR and len(r.expr.shape) == 2 and r.target.endswith(".weight")
    ]
    for rule in _middle(dense):
        import mlx.core as mx

        value = site.get(rule.target)
        size = min(64, value.shape[1])
        group = value[:, :size]
        low, high = group.min(axis=1, keepdims=True), group.max(axis=1, keepdims=True)
        # Codes q of a group become 15 - q: every value is mirrored at the middle of its range.
        flipped = mx.concatenate([low + high - group, value[:, size:]], axis=1)
        yield Planted(
            "flipped 4-bit block",
            (site.module(rule.target),),
            {rule.target: flipped},
        )


def _expert(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    stacked = [
        r
        for r in rules
        if len(r.expr.shape) == 3 and r.kind is Kind.LINEAR and r.target.endswith(".weight")
    ]
    for rule in _middle(stacked):
        import mlx.core as mx

        value = site.get(rule.target)
        if value.shape[1] == 1 or value.shape[2] == 1:
            return
        for number, expert in enumerate(value):
            wrong = expert.T.reshape(expert.shape)[None]
            whole = mx.concatenate([value[:number], wrong, value[number + 1 :]])
            yield Planted("transposed expert", (site.module(rule.target),), {rule.target: whole})


def _scale(site: Site, rules: Sequence[Rule]) -> Iterator[Planted]:
    scales = [r for r in rules if r.target.rpartition(".")[2] in _SCALES]
    for rule in _middle(scales):
        import mlx.core as mx

        value = site.get(rule.target)
        yield Planted(
            "missing layer scale",
            (site.module(rule.target),),
            {rule.target: mx.ones_like(value)},
        )


class Ground:
    """A twin with its conversion and the reference's trace: what faults are planted into."""

    def __init__(self, source: Path, out: Path, *, runtime: str = "mlx_vlm") -> None:
        from converter.pipeline import Request, convert
        from converter.ui import Console
        from validate.reference import TorchReference, read_config
        from validate.where.row import STEPS, Traced, rules_of
        from validate.where.torch_trace import trace_reference

        self.source, self.out, self.runtime = source, out, runtime
        if not out.exists():
            convert(Request(hf_path=str(source), mlx_path=out), Console(quiet=True))
        reference = TorchReference.load(source)
        self.ids = [(11 + 37 * n) % min(200, reference.vocab_size) for n in range(24 + STEPS)]
        apart = bool(reference.answer_so_far(()))
        asked, more = self.ids[:24], self.ids[24:]
        inputs = reference.text_inputs(asked if apart else self.ids)
        inputs |= reference.answer_so_far(more)
        traced = trace_reference(reference.model, source, inputs)
        self.traced = Traced(0, 24, STEPS, traced, 1 if apart else None)
        self.rules = rules_of(source, read_config(source), None)
        self.model = self._load(out)
        self.site = Site(self.model, out)

    def faults(self) -> list[Planted]:
        """One fault of each sort; of experts, the first that the prompt's tokens go to."""
        clean, found = self.model.logits(self.ids[:24]), dict[str, Planted]()
        for fault in faults(self.site, self.rules):
            if fault.name in found:
                continue
            self.site.plant(fault)
            if not np.array_equal(self.model.logits(self.ids[:24]), clean):
                found[fault.name] = fault
            self.site.mend(fault)
        return list(found.values())

    def locate(self, fault: Planted | None = None) -> Where:
        """Where the runtime parts from the reference, with a fault planted or without."""
        if fault is None:
            return self._locate(self.model, self.out)
        self.site.plant(fault)
        try:
            return self._locate(self.model, self.out)
        finally:
            self.site.mend(fault)

    def with_other_base(self, folder: Path) -> Where | None:
        """The same with a rotary base half as large again; None where the runtime reads none."""
        config = json.loads((self.out / "config.json").read_text())
        if not _other_base(config):
            return None
        shutil.copytree(self.out, folder)
        (folder / "config.json").write_text(json.dumps(config))
        changed, prompt = self._load(folder), self.ids[:24]
        if np.array_equal(changed.logits(prompt), self.model.logits(prompt)):
            return None
        return self._locate(changed, folder)

    def rightly(self, where: Where, modules: Sequence[str]) -> bool:
        """Whether the planted module is blamed, or the innermost compared one around it.

        Modules of experts and of fused projections have no outputs that both sides shape alike.
        """
        if where.first is None:
            return False
        compared = {step.mlx for step in where.steps if step.side == "out"}
        return any(
            where.first.mlx == next((p for p in _outwards(module) if p in compared), "")
            for module in modules
        )

    def _load(self, folder: Path) -> MlxRuntime:
        model = MlxRuntime.load(folder, runtime=self.runtime)
        model.to_float32(dense=False)
        return model

    def _locate(self, model: MlxRuntime, folder: Path) -> Where:
        from validate.deviations import deviations_for, without
        from validate.where.row import locate

        kind = str(model.config.get("model_type"))
        known = deviations_for(self.runtime, model_type=kind, modality="text")
        prompt, tokens = self.ids[:24], [*self.ids[24:], 0]
        with without(known, model.model, model.config, source=self.source):
            return locate(
                model.model,
                folder,
                self.rules,
                self.traced,
                lambda: model.continued(prompt, tokens),
            )


def _outwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _other_base(config: Any) -> bool:
    changed = False
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("vision_config", "audio_config"):
                continue
            if key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base") and isinstance(
                value, int | float
            ):
                config[key] = value * 1.5
                changed = True
            else:
                changed = _other_base(value) or changed
    return changed
