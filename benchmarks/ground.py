"""What faults are planted into: a twin, its conversion, and what the reference computed of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planted import Planted, Site, faults, with_other_base
from validate.answers import Answer, Question, media_questions
from validate.arrays import to_mlx
from validate.cases import MEDIA_FILES, load_cases
from validate.deviations import deviations_for, without
from validate.fault import Deviation
from validate.looking import borrowed_questions, medium
from validate.pictures import only_looks, prepared_picture
from validate.reference import Greedy, Logits, ReferenceError, TorchReference, read_config
from validate.runtime import MlxRuntime, Steps, is_generative
from validate.torch_faults import unbuilt
from validate.where.compare import Where
from validate.where.row import STEPS, Traced, locate, rules_of
from validate.where.torch_trace import states_of, trace_reference
from validate.where.trace import MOST_OF_MEDIA

_PROMPT = 24


@dataclass(frozen=True)
class Scene:
    """One prompt of a kind: how the reference computed it, and how to ask a runtime."""

    traced: Traced
    run: Callable[[MlxRuntime], Steps]
    known: tuple[Deviation, ...]
    """The runtime's documented faults, which are taken out."""


class Ground:
    """A twin with its conversion and the reference's traces: what faults are planted into."""

    def __init__(
        self,
        source: Path,
        out: Path,
        *,
        runtime: str = "mlx_vlm",
        kinds: Sequence[str] = ("text",),
    ) -> None:
        from converter.pipeline import Request, convert
        from converter.ui import Console

        self.source, self.out, self.runtime = source, out, runtime
        if not out.exists():
            convert(Request(hf_path=str(source), mlx_path=out), Console(quiet=True))
        self.rules = rules_of(source, read_config(source), None)
        self.model = self._load(out)
        self.site = Site(self.model, out)
        reference = TorchReference.load(source)
        self.scenes: dict[str, Scene] = {}
        self.unjudged: dict[str, str] = {}
        """Kinds of prompts that cannot be made or answered here, and why."""
        for kind in kinds:
            try:
                self.scenes[kind] = self._scene(kind, reference)
            except ReferenceError as error:
                self.unjudged[kind] = str(error)
        reference.close()

    def faults(self, kind: str = "text") -> list[Planted]:
        """One fault of each sort: the first that changes what the model computes."""
        scene, found = self.scenes[kind], dict[str, Planted]()
        clean = self._answer(scene)
        for fault in faults(self.site, self.rules, kind):
            if fault.name in found:
                continue
            self.site.plant(fault)
            if not np.array_equal(self._answer(scene), clean):
                found[fault.name] = fault
            self.site.mend(fault)
        return list(found.values())

    def locate(self, fault: Planted | None = None, kind: str = "text") -> Where:
        """Where the runtime parts from the reference, with a fault planted or without."""
        if fault is None:
            return self._locate(self.model, self.out, kind)
        self.site.plant(fault)
        try:
            return self._locate(self.model, self.out, kind)
        finally:
            self.site.mend(fault)

    def with_other_base(self, folder: Path, kind: str = "text") -> Where | None:
        """The same with a rotary base half as large again; None where the runtime reads none."""
        config = json.loads((self.out / "config.json").read_text())
        if not with_other_base(config, kind):
            return None
        shutil.copytree(self.out, folder)
        (folder / "config.json").write_text(json.dumps(config))
        changed, scene = self._load(folder), self.scenes[kind]
        if np.array_equal(self._answer(scene, changed), self._answer(scene)):
            return None
        return self._locate(changed, folder, kind)

    def rightly(self, where: Where, modules: Sequence[str]) -> bool:
        """Whether the planted module is blamed, or the innermost compared one around it.

        Modules of experts and of fused projections have no outputs that both sides shape alike.
        """
        compared = {step.mlx for step in where.steps if step.side == "out"}
        return where.first is not None and any(
            _is_named(where.first.mlx, module, compared) for module in modules
        )

    def _load(self, folder: Path) -> MlxRuntime:
        model = MlxRuntime.load(folder, runtime=self.runtime)
        model.to_float32(dense=False)
        return model

    def _answer(self, scene: Scene, model: MlxRuntime | None = None) -> Logits:
        model = model or self.model
        with without(scene.known, model.model, model.config, source=self.source):
            return scene.run(model).prefill

    def _locate(self, model: MlxRuntime, folder: Path, kind: str) -> Where:
        scene = self.scenes[kind]
        with without(scene.known, model.model, model.config, source=self.source):
            return locate(model.model, folder, self.rules, scene.traced, lambda: scene.run(model))

    def _scene(self, kind: str, reference: TorchReference) -> Scene:
        config = read_config(self.source)
        if kind == "image" and unbuilt(str(config.get("model_type"))):
            raise ReferenceError("transformers takes the tower from timm, which is not installed")
        if only_looks(config):
            return self._picture(reference)
        if not is_generative(config):
            return self._encoded(kind, reference)
        return self._text(reference) if kind == "text" else self._medium(kind, reference)

    def _known(self, modality: str) -> tuple[Deviation, ...]:
        name = str(self.model.config.get("model_type"))
        return deviations_for(self.runtime, model_type=name, modality=modality)

    def _text(self, reference: TorchReference) -> Scene:
        ids = _ids(_PROMPT + STEPS, reference)
        prompt, more = ids[:_PROMPT], ids[_PROMPT:]
        apart = bool(reference.answer_so_far(()))
        inputs = reference.text_inputs(prompt if apart else ids) | reference.answer_so_far(more)
        traced = trace_reference(reference.model, self.source, inputs)
        return Scene(
            Traced(0, _PROMPT, STEPS, traced, 1 if apart else None),
            # The last token of a continuation is not fed.
            lambda model: model.continued(prompt, [*more, 0]),
            self._known("text"),
        )

    def _medium(self, kind: str, reference: TorchReference) -> Scene:
        question = self._question(kind)
        whole = {**reference.cast(question.inputs), **reference.answer_so_far(())}
        traced = trace_reference(
            reference.model, self.source, whole, most=MOST_OF_MEDIA, bearing=True
        )
        known = tuple(d for d in self._known(kind) if not (question.borrowed and d.prepares))
        if any(deviation.prepares for deviation in known):
            inputs = to_mlx(question.inputs)
        else:
            nothing = Greedy((), np.zeros((0, 0), np.float32))
            with without(known, self.model.model, self.model.config, source=self.source):
                inputs = medium(self.model, Answer(question, traced.logits, nothing))
        rows = 1 if reference.answer_so_far(()) else None
        return Scene(
            Traced(0, len(question.ids), 0, traced, rows), lambda model: model.run(inputs), known
        )

    def _question(self, kind: str) -> Question:
        """The first fixed question, borrowed from the runtime where parity borrows it."""
        try:
            return media_questions(self.source, kind, trust_remote_code=False, most=1)[0]
        except ReferenceError as error:
            borrowed, row = borrowed_questions(self.out, error) if kind == "image" else ([], None)
            if not borrowed:
                raise ReferenceError(row.note if row else str(error)) from error
            return borrowed[0]

    def _picture(self, reference: TorchReference) -> Scene:
        pixels = prepared_picture(self.source, load_cases(MEDIA_FILES["image"])[0])
        inputs = reference.cast({"pixel_values": pixels})
        traced = trace_reference(
            reference.model,
            self.source,
            inputs,
            most=MOST_OF_MEDIA,
            call=states_of,
            bearing=True,
        )
        return Scene(
            Traced(0, len(traced.logits), 0, traced),
            lambda model: _steps(model.picture(pixels)),
            (),
        )

    def _encoded(self, kind: str, reference: TorchReference) -> Scene:
        model, folder, ids = reference.model, self.source, _ids(_PROMPT, reference)
        if kind == "text":
            call = _pooled_text if reference.is_pair else _encoder_states
            traced = trace_reference(model, folder, reference.text_inputs(ids), call=call)
        else:
            inputs = reference.cast(self._question(kind).inputs)
            fed = to_mlx(inputs)
            traced = trace_reference(
                model, folder, inputs, most=MOST_OF_MEDIA, call=states_of, bearing=True
            )

        def run(model: MlxRuntime) -> Steps:
            return _steps(model.hidden(ids)[0] if kind == "text" else model.states(fed))

        return Scene(Traced(0, len(traced.logits), 0, traced), run, self._known("sentence"))


def _encoder_states(model: Any, inputs: Any) -> Any:
    return states_of(model.base_model, inputs)  # below any head


def _pooled_text(model: Any, inputs: Any) -> Any:
    from torch.nn.functional import normalize

    return normalize(model.get_text_features(**inputs).pooler_output)


def _steps(states: Logits) -> Steps:
    return Steps(prefill=states, steps=states[-1:])


def _ids(count: int, reference: TorchReference) -> list[int]:
    return [(11 + 37 * n) % min(200, reference.vocab_size) for n in range(count)]


def _is_named(blamed: str, module: str, compared: set[str]) -> bool:
    for path in _outwards(module):
        if path == blamed:
            return True
        if path in compared:
            return False
    return blamed == ""


def _outwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
