"""Quality of the quantization methods on a small trained model, at equal bytes, side by side."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_TINYLM = Path(__file__).parent.parent / "tests" / "fixtures" / "tinylm"
METHODS = ("rtn", "mlx", "search", "imatrix", "gptq")
BARS = {("imatrix", 4): 0.7, ("imatrix", 3): 0.6, ("gptq", 4): 0.5, ("gptq", 3): 0.5}
"""The most that a method's mean KL may be of the same bits' rtn."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe: its size from the bytes on disk, and its distance from the release."""

    mode: str
    bits: int
    method: str
    bytes: int
    bits_per_weight: float
    kl: float
    p99: float
    top1: float
    perplexity: float
    seconds: float


def measure(source: Path, given: argparse.Namespace) -> list[Row]:
    """Convert ``source`` with every recipe and compare the logits on the evaluation text."""
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console
    from quant.calibrate.text import calibration_of
    from quant.recipe import CALIBRATED, QuantSpec

    recipes = [("affine", bits) for bits in given.bits]
    recipes += [(mode, None) for mode in given.modes]
    judge = Judge(source, given)
    rows = []
    data = source / "calibration.txt"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_CACHE_HOME", folder)
        for mode, bits in recipes:
            for method in given.methods:
                spec = QuantSpec.make(mode, bits, None, method)
                calibration = None
                if method in CALIBRATED:
                    calibration = calibration_of(
                        data, sequences=given.sequences, length=given.length
                    )
                options = Options(quant=spec, calibration=calibration)
                out = Path(folder) / f"{mode}-{bits}-{method}"
                start = time.perf_counter()
                request = Request(
                    hf_path=str(source), mlx_path=out, recipes=(options,), calibration_data=data
                )
                done = convert(request, Console(quiet=True))[0]
                spent = time.perf_counter() - start
                rows.append(judge.row(done, spec, spent))
                print(_line(rows[-1], rows), flush=True)
    return rows


class Judge:
    """The release's own log-probabilities on the evaluation text."""

    def __init__(self, source: Path, given: argparse.Namespace) -> None:
        import torch
        import transformers

        logs: Any = import_module("transformers.utils.logging")
        logs.disable_progress_bar()
        auto: Any = transformers
        tokenizer = auto.AutoTokenizer.from_pretrained(source)
        text = (source / "eval.txt").read_text(encoding="utf-8")
        ids = tokenizer(text, verbose=False)["input_ids"]
        count = min(len(ids) // given.length, given.eval_sequences)
        step = len(ids) // given.length / count
        rows = [int(i * step) * given.length for i in range(count)]
        self._ids = torch.tensor([ids[at : at + given.length] for at in rows])
        self._auto = auto.AutoModelForCausalLM
        self._reference = self._logs(source)

    def row(self, done: Any, spec: Any, seconds: float) -> Row:
        """Figures of a finished output, computed by torch on its dequantized weights."""
        from converter.pipeline import Request, convert
        from converter.plan import Options
        from converter.ui import Console

        with tempfile.TemporaryDirectory() as folder:
            back = Path(folder) / "torch"
            options = Options(target="torch", dtype="float32")
            request = Request(hf_path=str(done.folder), mlx_path=back, recipes=(options,))
            convert(request, Console(quiet=True))
            logs = self._logs(back)
        kl = (self._reference.exp() * (self._reference - logs)).sum(-1).flatten()
        targets = self._ids[:, 1:, None]
        nats = -logs[:, :-1].gather(-1, targets).mean()
        size = sum(f.stat().st_size for f in done.folder.glob("*.safetensors"))
        return Row(
            mode=spec.mode,
            bits=spec.bits,
            method=spec.method,
            bytes=size,
            bits_per_weight=8 * size / done.plan.parameters,
            kl=float(kl.mean()),
            p99=float(kl.quantile(0.99)),
            top1=float((logs.argmax(-1) == self._reference.argmax(-1)).float().mean()),
            perplexity=float(nats.exp()),
            seconds=seconds,
        )

    def _logs(self, folder: Path) -> Any:
        import torch

        model = self._auto.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            found = [model(row[None]).logits.log_softmax(-1) for row in self._ids]
        return torch.cat(found)


def _line(row: Row, rows: list[Row]) -> str:
    name = f"{row.mode} {row.bits}"
    rtn = next((r.kl for r in rows if (r.mode, r.bits, r.method) == (row.mode, row.bits, "rtn")), 0)
    ratio = row.kl / rtn if rtn else float("nan")
    bar = BARS.get((row.method, row.bits)) if row.mode == "affine" else None
    verdict = "" if bar is None else f"<= {bar}: {'met' if ratio <= bar else 'NOT met'}"
    return (
        f"| {name} | {row.method} | {row.bytes} | {row.bits_per_weight:.3f} | {row.kl:.5f} | "
        f"{row.p99:.4f} | {row.top1:.3f} | {row.perplexity:.2f} | {ratio:.3f} | {verdict} | "
        f"{row.seconds:.1f} |"
    )


def main() -> int:
    """Print the table; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=_TINYLM)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--modes", nargs="*", default=["mxfp4", "nvfp4"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-sequences", type=int, default=48)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    print("| recipe | method | bytes | bits/weight | KL | p99 | top-1 | ppl | of rtn | bar | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = measure(given.source, given)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any("NOT met" in _line(row, rows) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
