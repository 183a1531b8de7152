"""A drafter beside its model in the stock runtime: the same greedy text, drafted or not."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from validate.cases import TEXT_FILES, bounded, load_cases
from validate.checks import CaseResult, Check, Report, at_most
from validate.loaded import compare_loaded
from validate.reference import read_config
from validate.runtime import MlxRuntime, RuntimeRefusal, prepare_mlx

TOKENS: Final = 24
DRAFTED: Final = "drafted"
_SHOWN: Final = 3


def judge_drafter(
    drafter: Path,
    *,
    target: Path,
    plan: str | None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Judge ``drafter`` as mlx-vlm uses it for ``target``, both loaded as they are written.

    ``drafted`` counts the prompts whose greedy tokens differ from those without the drafter; how
    many drafts were accepted is reported beside it, because a drafter that is never right costs
    time and nothing else.
    """
    say = progress or (lambda message: None)
    prepare_mlx()
    checks: list[Check] = []
    described: dict[str, Any] = {"name": "mlx_vlm"}
    try:
        say("mlx_vlm: loading the model and its drafter")
        model = MlxRuntime.load(target, runtime="mlx_vlm")
        described = model.describe()
        loaded, kind = _load(drafter)
        checks.append(_weights(drafter, loaded))
        model.to_float32(dense=True)
        _to_float32(loaded)
        checks.append(_drafted(model, loaded, kind, say))
    except RuntimeRefusal as error:
        checks.append(Check(name=DRAFTED, modality="text", verdict="fail", note=str(error)))
    return Report(
        plan=plan,
        reference={"class": "the model without its drafter", "folder": target.name},
        runtime={"runtimes": [described]},
        checks=tuple(checks),
    )


def drafter_weights(drafter: Path) -> list[Check]:
    """What can be said of a drafter without its model: whether it is loaded as it is written."""
    prepare_mlx()
    try:
        loaded, _ = _load(drafter)
    except RuntimeRefusal as error:
        return [Check(name="load", modality="weights", verdict="fail", note=str(error))]
    return [_weights(drafter, loaded)]


def _load(folder: Path) -> tuple[Any, str]:
    drafters: Any = import_module("mlx_vlm.speculative.drafters")
    try:
        model, kind = drafters.load_drafter(str(folder))
    except Exception as error:  # a finding about the pair, whatever it is
        raise RuntimeRefusal(
            f"mlx_vlm cannot load the drafter {folder.name}: {type(error).__name__}: {error}"
        ) from error
    return model, str(kind)


def _weights(folder: Path, loaded: Any) -> Check:
    from mlx.utils import tree_flatten

    result = compare_loaded(folder, dict(tree_flatten(loaded.parameters())))
    count = float(len(result.problems))
    return Check(
        name="weights",
        modality="weights",
        runtime="mlx_vlm",
        value=count,
        threshold=0.0,
        verdict=at_most(count, 0.0),
        note="; ".join(result.problems[:_SHOWN]),
        metrics={"tensors": result.tensors, "bytes": result.bytes},
    )


def _to_float32(loaded: Any) -> None:
    import mlx.core as mx

    loaded.set_dtype(mx.float32)
    mx.eval(loaded.parameters())


def _drafted(model: MlxRuntime, loaded: Any, kind: str, say: Callable[[str], None]) -> Check:
    vocab = _vocab(model)
    cases = []
    rounds = accepted = 0
    for case in load_cases(*TEXT_FILES):
        say(f"mlx_vlm: {case.modality} {case.name}, drafted")
        ids = bounded(model.tokenize(case), vocab_size=vocab)
        alone = _greedy(model, ids)
        beside = _greedy(model, ids, draft_model=loaded, draft_kind=kind)
        lengths = [int(n) for n in getattr(loaded, "accept_lens", ())]
        rounds, accepted = rounds + len(lengths), accepted + sum(lengths)
        same = next(
            (at for at, pair in enumerate(zip(alone, beside, strict=False)) if pair[0] != pair[1]),
            min(len(alone), len(beside)),
        )
        cases.append(
            CaseResult(
                name=f"{case.modality} {case.name}",
                value=float(alone != beside),
                metrics={"tokens": len(alone), "equal": same},
            )
        )
    different = sum(case.value for case in cases)
    return Check(
        name=DRAFTED,
        modality="text",
        runtime="mlx_vlm",
        value=different,
        threshold=0.0,
        verdict=at_most(different, 0.0),
        note=f"greedy tokens with the drafter and without, {len(cases)} prompts",
        metrics={"prompts": len(cases), "rounds": rounds, "accepted": accepted},
        cases=tuple(cases),
    )


def _greedy(model: MlxRuntime, ids: list[int], **drafting: Any) -> list[int]:
    import mlx.core as mx

    generate: Any = import_module("mlx_vlm.generate.ar")
    inputs = mx.array([ids])
    try:
        steps = generate.generate_step(
            inputs, model.model, None, None, max_tokens=TOKENS, temperature=0.0, **drafting
        )
        return [int(token) for token, _ in steps]
    except Exception as error:  # a finding about the pair, whatever it is
        how = "with its drafter" if drafting else "alone"
        raise RuntimeRefusal(
            f"mlx_vlm cannot generate {how}: {type(error).__name__}: {error}"
        ) from error


def _vocab(model: MlxRuntime) -> int:
    config = read_config(model.folder)
    text = config.get("text_config") or config
    return int(text.get("vocab_size") or config.get("vocab_size") or 1)
