"""Chosen formats against one format for all, by the same method and at no more bytes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.quality import _TINYLM, Judge, Row

TARGET = 4.5
BAR = 0.8
"""The most that the mean KL of formats chosen for TARGET may be of uniform 4 bits, groups of 64."""


def rows(
    source: Path, judge: Judge, given: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Row]]:
    """The method and its row: for each uniform 4 bits, then formats chosen for 4.5 bits per weight.

    Chosen by the weights alone where the method needs no text, and by the activations.
    """
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console
    from quant.calibrate.text import calibration_of
    from quant.recipe import CALIBRATED, QuantSpec

    data = source / "calibration.txt"
    text = calibration_of(data, sequences=given.sequences, length=given.length)
    for method in given.methods:
        spec = QuantSpec.make("affine", 4, 64, method)
        own = text if method in CALIBRATED else None
        uniform = Options(quant=spec, calibration=own)
        recipes = {"uniform": uniform}
        if own is None:
            recipes["chosen by weights"] = replace(uniform, target_bits=TARGET)
        recipes["chosen by activations"] = replace(uniform, target_bits=TARGET, calibration=text)
        for name, options in recipes.items():
            out = folder / f"{method}-{name.replace(' ', '-')}"
            start = time.perf_counter()
            request = Request(
                hf_path=str(source), mlx_path=out, recipes=(options,), calibration_data=data
            )
            done = convert(request, Console(quiet=True))[0]
            formats = f"affine 4 g64, {name}" if name == "uniform" else name
            yield method, judge.row(formats, done.folder, time.perf_counter() - start)


def main() -> int:
    """Print the table; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=_TINYLM)
    parser.add_argument("--methods", nargs="*", default=["rtn", "imatrix", "gptq"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    judge = Judge(given.source)
    print("| method | formats | bytes | bits/weight | KL | p99 | top-1 | ppl | of uniform | s |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    found: list[tuple[str, Row]] = []
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_CACHE_HOME", folder)
        for method, row in rows(given.source, judge, given, Path(folder)):
            found.append((method, row))
            uniform = next(other for own, other in found if own == method)
            ratio = row.kl / uniform.kl
            missed |= row is not uniform and (ratio > BAR or row.bytes > uniform.bytes)
            print(
                f"| {method} | {row.name} | {row.bytes} | {row.bits_per_weight:.3f} | "
                f"{row.kl:.5f} | {row.p99:.4f} | {row.top1:.3f} | {row.perplexity:.2f} | "
                f"{ratio:.3f} | {row.seconds:.1f} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(
            json.dumps([{"method": m, **asdict(row)} for m, row in found], indent=1) + "\n"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
