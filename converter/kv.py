"""KV-cache settings of a finished output: chosen, measured, and written into config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from converter.errors import ConvertError, PlanError, UsageError
from converter.execute.folder import MANIFEST
from converter.manifest import read_manifest, renewed
from converter.plan.model import Plan
from converter.renewal import make_ready, renew
from converter.ui import Console

REPORT: Final = "kv_cache.json"
FLAG: Final = "--kv-quant-scheme"
DEFAULT_BITS: Final = 4.0
KEY: Final = "kv_cache_quantization"
PARTS: Final = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class KvAsked:
    """What the flags ask of the KV cache."""

    scheme: str
    bits: float | None = None
    group: int | None = None


def check_planned(plan: Plan, asked: KvAsked, *, model_file: Path | None = None) -> list[str]:
    """Say before anything is converted which layers' caches will be quantized, and which not.

    The runtime's own model is built on the plan's headers and called without values. PlanError
    where no layer's cache can be quantized, or a head cannot be stored as asked.
    """
    from quant.kv.scan import static_scan
    from quant.kv.study import LEAST, checked, kept_in_float
    from quant.kv.turbo import KvError
    from validate.runtime import RuntimeRefusal, is_generative, runtimes_for
    from validate.trace import planned_model

    place = None if model_file is None else model_file.parent
    runtimes = runtimes_for(plan.config, place)
    if not runtimes or not is_generative(plan.config):
        raise PlanError(
            [f"{FLAG}: no stock runtime generates text with {plan.model_type}: it has no KV cache"]
        )
    tensors = {t.name: (t.dtype, t.shape) for shard in plan.shards for t in shard.tensors}
    try:
        with planned_model(
            plan.config, tensors, runtime=runtimes[0], model_file=model_file
        ) as model:
            facts = static_scan(getattr(model, "language_model", model))
        checked(facts, asked.scheme, asked.bits or DEFAULT_BITS, asked.group or 64)
        if (context := _context(plan.config)) < LEAST:
            raise KvError(f"a context of {context} tokens is too short to study: {LEAST} or more")
    except KvError as error:
        raise PlanError([f"{FLAG} {asked.scheme}: {error}"]) from error
    except RuntimeRefusal as refusal:
        return [f"KV cache: {refusal}; its layers can be told only after the conversion"]
    count = sum(fact.quantizable for fact in facts)
    kept = kept_in_float(fact.reason for fact in facts)
    return [f"KV cache: {count} of {len(facts)} layers can be quantized", *kept]


def check_flags(scheme: str | None, bits: float | None, group: int | None) -> None:
    """Refuse contradictory KV flags before any work; UsageError naming them."""
    if scheme is None:
        given = [
            name
            for name, value in (("--kv-bits", bits), ("--kv-group-size", group))
            if value is not None
        ]
        if given:
            raise UsageError(f"{' and '.join(given)} without --kv-quant-scheme")
        return
    if bits is not None and not 1 <= bits <= 8:
        raise UsageError(f"--kv-bits {bits:g}: 1 to 8")
    if scheme == "uniform" and bits is not None and bits not in (2, 3, 4, 5, 6, 8):
        raise UsageError(f"--kv-bits {bits:g}: uniform caches have 2, 3, 4, 5, 6 or 8")
    if group is not None and scheme != "uniform":
        raise UsageError(f"--kv-group-size: {scheme} has no groups of channels")


def study_output(
    out: Path,
    *,
    scheme: str,
    bits: float | None,
    group: int | None,
    text: Path | None,
    console: Console,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Study the caches of ``out`` in its stock runtime; the content of kv_cache.json.

    Writes the report, puts the chosen settings under ``kv_cache_quantization`` in config.json and
    the bases that they name into a file beside it, and renews the manifest: all together, so that a
    kill leaves none of it, or what the next run completes. Raises ConvertError when the runtime or
    the heads do not allow it; the output is then as it was.
    """
    from quant.calibrate.text import CalibrationError
    from quant.kv.learned import packed
    from quant.kv.spec import BASES
    from quant.kv.study import Texts, flags_for, study
    from quant.kv.turbo import KvError
    from validate.runtime import (
        MlxRuntime,
        RuntimeRefusal,
        is_generative,
        prepare_mlx,
        runtimes_for,
    )

    read_manifest(out)
    check_text(text)
    make_ready(out)
    prepare_mlx()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    runtimes = runtimes_for(config)
    if not runtimes or not is_generative(config):
        raise ConvertError(f"{out}: no stock runtime generates text with it, so it has no KV cache")
    try:
        tokens = _tokens(out, config, text)
        Texts.of(tokens)  # too few are told before a large model is loaded
        model = MlxRuntime.load(out, runtime=runtimes[0], trust_remote_code=trust_remote_code)
        model.to_float32(dense=True)
        language = getattr(model.model, "language_model", model.model)
        found = study(
            language,
            tokens,
            choice=scheme,  # type: ignore[arg-type]
            bits=DEFAULT_BITS if bits is None else bits,
            group=group or 64,
            progress=lambda said: console.say(f"  {said}"),
        )
    except (KvError, RuntimeRefusal, CalibrationError) as error:
        raise ConvertError(f"{out}: its KV cache cannot be quantized as asked: {error}") from error
    report = {
        "runtime": model.describe(),
        "flags": flags_for(found),
        "not_honoured": "No stock runtime reads these settings from config.json; they are for "
        "programs that do. The flags above are the runtime's own schemes, measured alike.",
        **found.report,
    }
    body = (json.dumps(report, indent=1) + "\n").encode()
    settings = {
        "scheme": scheme,
        "bits": report["chosen"]["bits"],
        "effective_bits": report["chosen"]["effective_bits"],
        **found.spec.to_json(),
        "report_sha256": hashlib.sha256(body).hexdigest(),
    }
    bases = found.spec.bases
    files = {
        REPORT: body,
        BASES: packed(bases) if bases else None,
        "config.json": (json.dumps({**config, KEY: settings}, indent=4) + "\n").encode(),
    }
    renew(out, {**files, MANIFEST: renewed(out, files)})
    return report


def summary_text(report: dict[str, Any]) -> str:
    """What the terminal shows: the chosen scheme and the stock ones, by loss at long context."""
    from quant.kv.study import kept_in_float

    chosen = report["chosen"]
    rows = [("chosen: " + str(chosen["scheme"]), chosen["effective_bits"], chosen)]
    rows += [(row["flags"] + _in_float(row), row["effective_bits"], row) for row in report["stock"]]
    lines = [
        "          short text            long text",
        "  bits    prefill   decode      prefill   decode      same    setting",
    ]
    for name, bits, row in rows:
        if "error" in row:
            lines.append(f"  {bits:<6.3f}  {row['error'][:60]}  {name}")
            continue
        cells = [row[text][part]["all"] for text in ("short", "long") for part in PARTS]
        kls = "  ".join(f"{cell['kl_mean']:<8.2g}" for cell in cells[:2])
        kls += "    " + "  ".join(f"{cell['kl_mean']:<8.2g}" for cell in cells[2:])
        lines.append(f"  {bits:<6.3f}  {kls}    {cells[3]['top1']:<6.3f}  {name}")
    lines.append(
        "  KL in nats, mean over positions; same: positions with the same first choice, decoding a "
        "long text"
    )
    lines += [
        f"  layer {one['layer']}: of each head's {one['of']} {len(one['channels'][0])} massive "
        "channels stay in half precision"
        for one in chosen["aside"]
    ]
    lines += [f"  {line}" for line in kept_in_float(fact["reason"] for fact in report["layers"])]
    return "\n".join(lines)


def _in_float(row: Mapping[str, Any]) -> str:
    """The layers that a stock setting leaves alone though they could be quantized."""
    left = ", ".join(map(str, row["in_float"]))
    return f"; layer{'s' * (len(row['in_float']) > 1)} {left} in float" if left else ""


def check_text(path: Path | None) -> None:
    """Refuse a text to measure on that cannot be read; UsageError in one sentence."""
    from quant.calibrate.text import CalibrationError, read_text

    try:
        read_text(path)
    except CalibrationError as error:
        raise UsageError(str(error)) from error


def _tokens(out: Path, config: Mapping[str, Any], text: Path | None) -> list[int]:
    """The text in the release's own tokens, as far as a long study reads."""
    from quant.calibrate.text import CalibrationError, read_text
    from validate.processor import load_tokenizer

    tokenizer = load_tokenizer(out)
    if tokenizer is None:
        raise CalibrationError(f"{out}: no tokenizer to read text with")
    ids = list(tokenizer.encode(read_text(text), add_special_tokens=False))
    return ids[: _context(config)]


def _context(config: Mapping[str, Any]) -> int:
    """Tokens that a study of the model reads: those of a long one, or all that the model takes."""
    from quant.kv.study import LONG

    inner = config.get("text_config")
    limit = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    return min(LONG, int(limit or LONG))
