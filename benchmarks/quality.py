"""Quality of the quantization methods on a small trained model, at equal bytes, side by side.

``python -m benchmarks.quality`` converts the model with every recipe, runs the calibrated
quantizers of mlx-lm on the same model and calibration text, and compares everybody's logits with
those of the release on the whole evaluation text. More recipes are more entries of ``RECIPES``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

_TINYLM = Path(__file__).parent.parent / "tests" / "fixtures" / "tinylm"
_LENGTH: Final = 256
"""Tokens of one evaluation window."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to quantize, the row it is compared with, and the most that their KL ratio may be."""

    name: str
    mode: str = "affine"
    bits: int | None = None
    method: str = "rtn"
    target: float | None = None
    """Bits per weight that formats are chosen for."""
    by: str = ""
    """What they are chosen by: "weights" or "activations"."""
    stock: tuple[str, ...] = ()
    """A tool of mlx-lm with its flags, in place of our own conversion."""
    beside: str = ""
    """The row that the KL is divided by."""
    bar: float | None = None
    beats: tuple[str, ...] = ()
    """Rows whose KL this one must stay under."""


def _own() -> Iterator[Recipe]:
    bars = {("imatrix", 4): 0.7, ("imatrix", 3): 0.6, ("gptq", 4): 0.5, ("gptq", 3): 0.5}
    beats = {
        4: ("mlx_lm awq 4", "mlx_lm gptq 4", "mlx_lm dynamic_quant 4.5"),
        3: ("mlx_lm awq 3", "mlx_lm dynamic_quant 3.5"),
        2: ("mlx_lm gptq 2",),
    }
    for bits in (4, 3, 2):
        tuned = ("autoround",) if bits <= 3 else ()
        for method in ("mlx", "rtn", "search", "imatrix", "gptq", *tuned):
            yield Recipe(
                name=f"affine {bits} {method}",
                bits=bits,
                method=method,
                beside=f"affine {bits} rtn",
                bar=bars.get((method, bits)),
                beats={"gptq": beats[bits], "autoround": (f"affine {bits} gptq",)}.get(method, ()),
            )
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        for method in ("rtn", "search", "imatrix", "gptq"):
            yield Recipe(name=f"{mode} {method}", mode=mode, method=method, beside=f"{mode} rtn")


def _chosen() -> Iterator[Recipe]:
    """Formats chosen for the size of uniform 4 bits, by the same method."""
    for method in ("rtn", "imatrix", "gptq"):
        for by in ("weights", "activations") if method == "rtn" else ("activations",):
            yield Recipe(
                name=f"4.5 bpw {method} by {by}",
                method=method,
                target=4.5,
                by=by,
                beside=f"affine 4 {method}",
                bar=0.8,
            )


def _stock() -> Iterator[Recipe]:
    for bits in (4, 3):
        table = ("--embed-bits", str(bits), "--embed-group-size", "64")
        yield Recipe(
            name=f"mlx_lm awq {bits}",
            stock=("awq", "--num-samples", "16", "--bits", str(bits), *table),
            beside=f"affine {bits} rtn",
        )
    for bits in (4, 2):  # the tool packs no 3
        yield Recipe(
            name=f"mlx_lm gptq {bits}",
            stock=("gptq", "--bits", str(bits), "--fallback-bits", str(bits)),
            beside=f"affine {bits} rtn",
        )
    for bits, target in ((4, "4.5"), (3, "3.5")):
        ends = ("--low-bits", str(bits - 1), "--high-bits", str(bits + 1))
        yield Recipe(
            name=f"mlx_lm dynamic_quant {target}",
            stock=("dynamic_quant", "--target-bpw", target, *ends),
            beside=f"affine {bits} rtn",
        )


RECIPES: Final = (*_own(), *_chosen(), *_stock())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe's size from the bytes on disk, and its distance from the release."""

    name: str
    bytes: int = 0
    bits_per_weight: float = 0.0
    kl: float = 0.0
    p99: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0
    seconds: float = 0.0
    failed: str = ""
    """Why there are no figures."""


def measure(source: Path, recipes: Sequence[Recipe], given: argparse.Namespace) -> Iterator[Row]:
    """Quantize ``source`` by every recipe and compare the logits on the evaluation text."""
    judge = Judge(source)
    given.work.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(given.work / "cache")
    for recipe in recipes:
        out = given.work / recipe.name.replace(" ", "-")
        start = time.perf_counter()
        failed = ""
        if recipe.stock:
            failed = _run_stock(source, recipe, out, given)
        else:
            _convert(source, recipe, out, given)
        spent = time.perf_counter() - start
        if failed:
            yield Row(name=recipe.name, seconds=spent, failed=failed)
        else:
            yield judge.row(recipe.name, out, spent)


def _convert(source: Path, recipe: Recipe, out: Path, given: argparse.Namespace) -> None:
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console
    from quant.calibrate.text import calibration_of
    from quant.recipe import CALIBRATED, QuantSpec

    data = source / "calibration.txt"
    calibration = None
    if recipe.method in CALIBRATED or recipe.by == "activations":
        calibration = calibration_of(data, sequences=given.sequences, length=given.length)
    spec = QuantSpec.make(recipe.mode, recipe.bits, None, recipe.method)
    options = Options(quant=spec, calibration=calibration, target_bits=recipe.target)
    request = Request(
        hf_path=str(source),
        mlx_path=out,
        recipes=(options,),
        calibration_data=data,
        overwrite=True,
    )
    convert(request, Console(quiet=True))


def _run_stock(source: Path, recipe: Recipe, out: Path, given: argparse.Namespace) -> str:
    from benchmarks.stock_quantizers import run
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console

    plain = given.work / "bf16"
    if not plain.exists():
        request = Request(hf_path=str(source), mlx_path=plain, recipes=(Options(),))
        convert(request, Console(quiet=True))
    if (out / "config.json").exists() and given.reuse:
        return ""
    tool, *flags = recipe.stock
    return run(
        tool,
        plain,
        out,
        text=source / "calibration.txt",
        home=given.work / "home",
        flags=flags,
        limit=given.limit,
    )


class Judge:
    """The release's own log-probabilities on the whole evaluation text."""

    def __init__(self, source: Path) -> None:
        """Run the release."""
        import torch
        import transformers

        logs: Any = import_module("transformers.utils.logging")
        logs.disable_progress_bar()
        auto: Any = transformers
        tokenizer = auto.AutoTokenizer.from_pretrained(source)
        text = (source / "eval.txt").read_text(encoding="utf-8")
        ids = tokenizer(text, verbose=False)["input_ids"]
        count = len(ids) // _LENGTH
        self._ids = torch.tensor(ids[: count * _LENGTH]).view(count, _LENGTH)
        self._auto = auto.AutoModelForCausalLM
        self._reference = list(self._logs(source))

    def row(self, name: str, out: Path, seconds: float) -> Row:
        """Figures of a finished output, computed by torch on its dequantized weights."""
        import torch

        from converter.pipeline import Request, convert
        from converter.plan import Options
        from converter.ui import Console

        with tempfile.TemporaryDirectory() as folder:
            back = Path(folder) / "torch"
            options = Options(target="torch", dtype="float32")
            request = Request(hf_path=str(out), mlx_path=back, recipes=(options,))
            done = convert(request, Console(quiet=True))[0]
            found, same, nats = [], 0, 0.0
            for ids, p, q in zip(self._batches(), self._reference, self._logs(back), strict=True):
                found.append((p.exp() * (p - q)).sum(-1).flatten())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                nats -= float(q[:, :-1].gather(-1, ids[:, 1:, None]).double().sum())
        kl = torch.cat(found).double()
        size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        return Row(
            name=name,
            bytes=size,
            bits_per_weight=8 * size / done.plan.parameters,
            kl=float(kl.mean()),
            p99=float(kl.quantile(0.99)),
            top1=same / len(kl),
            perplexity=float(torch.tensor(nats / (self._ids.numel() - len(self._ids))).exp()),
            seconds=seconds,
        )

    def _batches(self) -> Sequence[Any]:
        import torch

        found: Sequence[Any] = torch.split(self._ids, 4)
        return found

    def _logs(self, folder: Path) -> Iterator[Any]:
        """Log-probabilities, (windows, tokens, vocabulary), of a few windows at a time."""
        import torch

        model = self._auto.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            for ids in self._batches():
                yield model(ids).logits.log_softmax(-1)


HEAD: Final = (
    "| recipe | bytes | bits/weight | KL | p99 | top-1 | ppl | ratio | verdict | s |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(recipe: Recipe, rows: dict[str, Row]) -> str:
    """The row of a table, with its verdict where the recipe has a bar."""
    row = rows[recipe.name]
    if row.failed:
        return f"| {row.name} | | | | | | | | {row.failed} | {row.seconds:.0f} |"
    beside = rows.get(recipe.beside)
    ratio = row.kl / beside.kl if beside and beside.kl else None
    return (
        f"| {row.name} | {row.bytes} | {row.bits_per_weight:.3f} | {row.kl:.5f} | "
        f"{row.p99:.4f} | {row.top1:.3f} | {row.perplexity:.2f} | "
        f"{'' if ratio is None else f'{ratio:.3f}'} | {verdict(recipe, rows)} | "
        f"{row.seconds:.0f} |"
    )


def verdict(recipe: Recipe, rows: dict[str, Row]) -> str:
    """What became of the recipe's bars; "NOT MET" is in it where one is missed."""
    row, said = rows[recipe.name], []
    beside = rows.get(recipe.beside)
    if recipe.bar is not None and beside is not None:
        met = row.kl <= recipe.bar * beside.kl and row.bytes <= beside.bytes
        said.append(f"<= {recipe.bar}: {'met' if met else 'NOT MET'}")
    for other in recipe.beats:
        if (theirs := rows.get(other)) is None:
            continue
        met = bool(theirs.failed) or row.kl < theirs.kl
        word = "no figure" if theirs.failed else "met" if met else "NOT MET"
        said.append(f"< {other}: {word}")
    return "; ".join(said)


def main() -> int:
    """Print the table; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=_TINYLM)
    parser.add_argument("--only", nargs="*", help="recipes by name; all by default")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a stock tool")
    parser.add_argument("--work", type=Path, help="keep the outputs here")
    parser.add_argument("--reuse", action="store_true", help="of stock tools, from --work")
    parser.add_argument("--out", type=Path, help="write FILE.md and FILE.json as well")
    given = parser.parse_args()
    named = [r for r in RECIPES if given.only is None or r.name in given.only]
    rows = _earlier(given) if given.only is not None else {}
    with tempfile.TemporaryDirectory() as folder:
        given.work = given.work or Path(folder)
        for row in measure(given.source, named, given):
            rows[row.name] = row
            print(f"{row.name}: KL {row.kl:.5f} {row.failed}", file=sys.stderr, flush=True)
            if given.out:  # a run that is broken off leaves what it has
                _write(given, [r for r in RECIPES if r.name in rows], rows)
    print(_table(named, rows))
    return 1 if any("NOT MET" in verdict(recipe, rows) for recipe in named) else 0


def _earlier(given: argparse.Namespace) -> dict[str, Row]:
    """The rows of an earlier run that ``--out`` holds, which those of ``--only`` replace."""
    path = given.out and given.out.with_suffix(".json")
    if not path or not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {row["name"]: Row(**row) for row in data["rows"]}


def _table(recipes: Sequence[Recipe], rows: dict[str, Row]) -> str:
    return "\n".join([HEAD, *(line(recipe, rows) for recipe in recipes)])


def _write(given: argparse.Namespace, recipes: Sequence[Recipe], rows: dict[str, Row]) -> None:
    packages = ("mlx", "mlx-lm", "torch", "transformers", "numba")
    versions = {name: version(name) for name in packages}
    data = {
        "model": given.source.name,
        "calibration": {"sequences": given.sequences, "length": given.length},
        "versions": versions,
        "rows": [asdict(rows[recipe.name]) for recipe in recipes],
    }
    given.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    given.out.with_suffix(".md").write_text(
        "# Quality of quantized weights\n\n"
        "Written by `python -m benchmarks.quality --out benchmarks/quality`. Mean KL divergence "
        f"(nats per token) of `{given.source.name}` from the bf16 release on its whole evaluation "
        "text, computed by torch from the dequantized weights. Our calibrated methods used "
        f"{given.sequences} x {given.length} tokens of the calibration text. The tools of mlx-lm "
        "take all of it by default; awq, which runs every block dozens of times, got 16 x 512 "
        "tokens of it, for want of hours. Affine groups have 64 columns. Rows of equal bytes are "
        "comparable; `ratio` divides the KL by that of `rtn` at the same bits, and for formats "
        "chosen for 4.5 bits per weight by that of uniform 4 bits with the same method, at no more "
        "bytes. `--only` replaces rows of an earlier run. Seconds are of a "
        f"shared machine and say little; outputs that were there already took none. "
        f"{len(rows)} of {len(RECIPES)} recipes were run. {used}.\n\n{_table(recipes, rows)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
