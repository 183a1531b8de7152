"""KV-cache settings of a finished output: chosen, measured, and written into config.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from converter.errors import ConvertError, UsageError
from converter.manifest import file_sha256, read_manifest, refresh
from converter.ui import Console

REPORT: Final = "kv_cache.json"
KEY: Final = "kv_cache_quantization"


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

    Writes the report, puts the chosen settings under ``kv_cache_quantization`` in config.json, and
    renews the manifest. Raises ConvertError when the runtime or the heads do not allow it; the
    output is then as it was.
    """
    from quant.calibrate.text import CalibrationError
    from quant.kv.study import flags_for, study
    from quant.kv.turbo import KvError
    from validate.runtime import (
        MlxRuntime,
        RuntimeRefusal,
        is_generative,
        prepare_mlx,
        runtimes_for,
    )

    read_manifest(out)
    prepare_mlx()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    runtimes = runtimes_for(config)
    if not runtimes or not is_generative(config):
        raise ConvertError(f"{out}: no stock runtime generates text with it, so it has no KV cache")
    try:
        model = MlxRuntime.load(out, runtime=runtimes[0], trust_remote_code=trust_remote_code)
        model.to_float32(dense=True)
        language = getattr(model.model, "language_model", model.model)
        found = study(
            language,
            _tokens(out, text),
            choice=scheme,  # type: ignore[arg-type]
            bits=bits if bits is not None else 4.0,
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
    body = json.dumps(report, indent=1) + "\n"
    _write(out / REPORT, body)
    settings = {
        "scheme": scheme,
        "bits": report["chosen"]["bits"],
        "effective_bits": report["chosen"]["effective_bits"],
        **found.spec.to_json(),
        "report_sha256": hashlib.sha256(body.encode()).hexdigest(),
    }
    _write(out / "config.json", json.dumps({**config, KEY: settings}, indent=4) + "\n")
    refresh(out, {name: file_sha256(out / name) for name in ("config.json", REPORT)})
    return report


def summary_text(report: dict[str, Any]) -> str:
    """What the terminal shows: the chosen scheme and the stock ones, by loss at long context."""
    chosen = report["chosen"]
    rows = [("chosen: " + str(chosen["scheme"]), chosen["effective_bits"], chosen)]
    rows += [(row["flags"], row["effective_bits"], row) for row in report["stock"]]
    lines = ["  bits    KL short     KL long      top-1 long  setting"]
    for name, bits, row in rows:
        if "error" in row:
            lines.append(f"  {bits:<6.3f}  {row['error'][:60]}  {name}")
            continue
        short, long = row["short"]["all"], row["long"]["all"]
        lines.append(
            f"  {bits:<6.3f}  {short['kl_mean']:<11.3g}  {long['kl_mean']:<11.3g}  "
            f"{long['top1']:<10.4f}  {name}"
        )
    kept = [fact for fact in report["layers"] if fact["reason"]]
    for reason in dict.fromkeys(fact["reason"] for fact in kept):
        count = sum(fact["reason"] == reason for fact in kept)
        lines.append(f"  {count} layers stay in float: {reason}")
    return "\n".join(lines)


def _tokens(out: Path, text: Path | None) -> list[int]:
    """The text in the release's own tokens, as far as a long study reads."""
    from quant.calibrate.text import CalibrationError, read_text
    from quant.kv.study import LONG
    from validate.processor import load_tokenizer

    tokenizer = load_tokenizer(out)
    if tokenizer is None:
        raise CalibrationError(f"{out}: no tokenizer to read text with")
    ids = list(tokenizer.encode(read_text(text), add_special_tokens=False))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    limit = inner.get("max_position_embeddings") or LONG
    return ids[: min(LONG, int(limit))]


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
