"""The measurements, by name; each returns its rows of the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Final

from benchmarks.bench import Bench, tool, weight_bytes
from benchmarks.report import Row
from benchmarks.series import Contender, Ratio, Series, remove

MIB: Final = 2**20
PEAK_BAR: Final = 600.0
VARIANTS: Final = ("bf16", "8bit", "4bit", "mxfp4", "nvfp4")
PLAN_TENSORS: Final = 100_000
TWINS: Final = ("qwen3", "minicpmv4_6")
QUANTIZED = Sequence[tuple[str, tuple[str, ...], float]]


def io_floor(bench: Bench) -> list[Row]:
    """bf16 copy and 4-bit against reading the source once and writing the output once."""
    source = bench.release()
    rows = []
    recipes = (("bf16 copy", (), 1.25), ("4-bit affine", ("-q",), 2.0))
    for name, flags, bar in recipes:
        ours = bench.ours(name.replace(" ", "-"), source, *flags)
        bench.compete([ours], rounds=1)  # warms up, and tells how much the floor has to write
        assert ours.out is not None
        floor = bench.floor("floor", source, weight_bytes(ours.out))
        found = bench.compete([ours, floor])
        _clear(ours, floor)
        rows.append(_ratio(f"{name} / I/O floor", found[ours.name], found["floor"], "<=", bar))
        rows.append(_peak(f"peak memory, {name}", found[ours.name]))
    return rows


def affine(bench: Bench) -> list[Row]:
    """4-bit affine against both stock converters, and whether the codes are the same."""
    source = bench.release()
    rtn = bench.ours("rtn", source, "-q")
    mlx = bench.ours("mlx", source, "-q", "--q-method", "mlx")
    stock = [bench.stock(program, source, "-q") for program in ("mlx_lm", "mlx_vlm")]
    bench.warm_up("-q", programs=[other.name for other in stock])
    found = bench.compete([rtn, mlx, *stock])
    rows = []
    for other in stock:
        for own in (rtn, mlx):
            what = f"4-bit affine, {other.name}.convert / --q-method {own.name}"
            rows.append(_ratio(what, found[other.name], found[own.name], ">=", 6.0))
        rows.append(_peak(f"peak memory, {other.name}.convert -q", found[other.name], bar=None))
        rows.append(_same(bench, mlx, other))
    _clear(rtn, mlx, *stock)
    return rows


def microscaled(bench: Bench) -> list[Row]:
    """mxfp4, nvfp4 and mxfp8 against mlx_lm.convert, one round."""
    source = bench.slow_release()
    modes: QUANTIZED = (
        ("mxfp4", ("--q-group-size", "32", "--q-bits", "4"), 60.0),
        ("nvfp4", ("--q-group-size", "16", "--q-bits", "4"), 60.0),
        ("mxfp8", ("--q-group-size", "32", "--q-bits", "8"), 0.0),
    )
    rows = []
    for mode, flags, bar in modes:
        ours = bench.ours(mode, source, "-q", "--q-mode", mode, "--q-method", "mlx")
        stock = bench.stock("mlx_lm", source, "-q", "--q-mode", mode, *flags)
        bench.warm_up("-q", "--q-mode", mode)
        found = bench.compete([ours, stock], rounds=1)
        what = f"{mode}, mlx_lm.convert / ours, {weight_bytes(source) / 1e9:.1f} GB"
        rows.append(_ratio(what, found["mlx_lm"], found[mode], ">=", bar or None))
        rows.append(_same(bench, ours, stock))
        _clear(ours, stock)
    return rows


def variants(bench: Bench) -> list[Row]:
    """Five variants from one read against each of them alone."""
    source = bench.release()
    single = [bench.ours(name, source, "--variants", name) for name in VARIANTS]
    together = bench.ours("five", source, "--variants", ",".join(VARIANTS))
    bench.warm_up("--variants", ",".join(VARIANTS))
    found = bench.compete([*single, together])
    slowest = max((found[name] for name in VARIANTS), key=lambda series: series.seconds)
    what = f"five variants in one pass / slowest alone ({slowest.name})"
    rows = [_ratio(what, found["five"], slowest, "<=", 2.5)]
    rows.append(_peak("peak memory, five variants in one pass", found["five"]))
    total = sum(found[name].seconds for name in VARIANTS)
    rows.append(
        Row(
            what="five variants in one pass / the five one after another",
            value=found["five"].seconds / total,
            unit="x",
            how="medians of the rounds",
            raw=_raw(*found.values()),
        )
    )
    alone = found["bf16"].read_bytes
    once = found["five"].read_bytes
    if alone is not None and once is not None:
        # Each run reads its source and, to hash them, its outputs; the source is what both share.
        assert together.out is not None
        outputs = sum(weight_bytes(folder) for folder in together.out.iterdir())
        size = weight_bytes(source)
        hashed = outputs * round((alone - size) / size)
        rows.append(
            Row(
                what="times the source is read, five variants",
                value=(once - hashed) / size,
                unit="x",
                bar=1.1,
                how=f"bytes from read calls, less {hashed / 1e9:.2f} GB of outputs being hashed",
            )
        )
    _clear(*single, together)
    return rows


def memory(bench: Bench) -> list[Row]:
    """Peak memory of 4-bit conversions of growing sources."""
    bench.warm_up("-q")
    sizes = [0.5e9, 2e9, *((8e9, 32e9) if bench.large else ())]
    rows = []
    for size in sizes:
        source = bench.zero_release(size)
        ours = bench.ours(f"zeros-{size / 1e9:g}", source, "-q")
        found = bench.compete([ours], rounds=1)
        _clear(ours)
        rows.append(_peak(f"peak memory, 4-bit, {size / 1e9:g} GB source", found[ours.name]))
        remove(source)
    rows.append(
        Row(
            what=f"peak memory, {sizes[-1] / 1e9:g} GB / {sizes[0] / 1e9:g} GB source",
            value=rows[-1].value / rows[0].value,
            unit="x",
            bar=1.25,
            how="flat",
        )
    )
    return rows


def plan(bench: Bench) -> list[Row]:
    """The plan of a release of 100,000 tensors, from its headers."""
    source = bench.wide_release(PLAN_TENSORS)
    command = (tool("convert"), "plan", "--hf-path", source, "-q")
    found = bench.compete([Contender(name="plan", command=command)])["plan"]
    timed = json.loads(bench.module("planning", source))
    size = weight_bytes(source)
    read = "" if found.read_bytes is None else f", {found.read_bytes / MIB:.0f} MiB read in all"
    remove(source)
    how = f"{timed['tensors']:,} tensors, {size / 1e12:.2f} TB of holes{read}"
    return [
        Row(
            what="convert plan, 100,000 tensors, the whole command",
            value=found.seconds,
            unit="s",
            relation="<",
            bar=3.0,
            how=how,
            raw=_raw(found),
        ),
        Row(
            what="build_plan alone, 100,000 tensors",
            value=timed["build"],
            unit="s",
            how=f"after opening in {timed['open']:.2f} s and matching in {timed['match']:.2f} s",
        ),
    ]


def kernels(bench: Bench) -> list[Row]:
    """Every method, mode and width against mx.quantize, without files: processor time of a core."""
    rows = []
    for one in json.loads(bench.module("kernels")):
        what, stock = f"{one['mode']} {one['bits']}-bit", one["stock"]
        bar = 60.0 if one["mode"] in ("mxfp4", "nvfp4") else 6.0
        for method in ("mlx", "rtn"):
            rows.append(
                Row(
                    what=f"kernel of {method}, {what} / mx.quantize",
                    value=one[method] / stock,
                    unit="x",
                    relation=">=",
                    bar=bar,
                    how=f"{one[method]:.2f} GB/s / {stock:.3f} GB/s of bf16",
                )
            )
        for method in ("search", "imatrix"):
            rows.append(
                Row(
                    what=f"kernel of {method}, {what}",
                    value=one[method],
                    unit="GB/s",
                    relation=">=",
                    bar=0.1,
                    how="of bf16 on a core: 0.2 GB/s on two",
                )
            )
    return rows


def twin(bench: Bench) -> list[Row]:
    """Twin, conversion and parity report of one architecture."""
    rows = []
    for model_type in TWINS:
        folder, out = bench.work / "twin", bench.work / "twin-mlx"
        make = (tool("convert"), "twin", model_type, folder)
        prove = (tool("convert"), "--hf-path", folder, "--mlx-path", out, "--quiet")
        totals = []
        for _ in range(bench.rounds):
            made = bench.compete([Contender(name="twin", command=make, out=folder)], rounds=1)
            proven = bench.compete([Contender(name="prove", command=prove, out=out)], rounds=1)
            totals.append(made["twin"].seconds + proven["prove"].seconds)
        remove(folder)
        remove(out)
        rows.append(
            Row(
                what=f"twin, convert and validate, {model_type}",
                value=sorted(totals)[len(totals) // 2],
                unit="s",
                relation="<",
                bar=30.0,
                how=f"{min(totals):.1f} to {max(totals):.1f} s",
                raw={"seconds": totals},
            )
        )
    return rows


def help_text(bench: Bench) -> list[Row]:
    """How long `convert --help` takes."""
    asked = Contender(name="help", command=[tool("convert"), "--help"])
    found = bench.compete([asked], rounds=5)["help"]
    return [
        Row(
            what="convert --help",
            value=found.seconds,
            unit="s",
            relation="<",
            bar=0.5,
            how="median of 5",
            raw=_raw(found),
        )
    ]


CASES: Final[Mapping[str, Callable[[Bench], list[Row]]]] = {
    "floor": io_floor,
    "affine": affine,
    "microscaled": microscaled,
    "variants": variants,
    "memory": memory,
    "plan": plan,
    "kernels": kernels,
    "twin": twin,
    "help": help_text,
}
"""Every measurement by the name that ``--only`` takes."""


def _ratio(what: str, above: Series, below: Series, relation: str, bar: float | None) -> Row:
    ratio = Ratio.of(above, below)
    return Row(
        what=what,
        value=ratio.median,
        unit="x",
        relation=">=" if relation == ">=" else "<=",
        bar=bar,
        how=(
            f"{above.seconds:.2f} s / {below.seconds:.2f} s; rounds {min(ratio.pairs):.2f} to "
            f"{max(ratio.pairs):.2f}, best runs {ratio.best:.2f}"
        ),
        raw=_raw(above, below),
    )


def _peak(what: str, series: Series, *, bar: float | None = PEAK_BAR) -> Row:
    return Row(
        what=what,
        value=series.peak_bytes / MIB,
        unit="MiB",
        bar=bar,
        how="largest of its runs",
        raw=_raw(series),
    )


def _same(bench: Bench, ours: Contender, stock: Contender) -> Row:
    assert ours.out is not None
    assert stock.out is not None
    found = json.loads(bench.module("compare", ours.out, stock.out))
    such_as = f", such as {', '.join(found['such_as'])}" if found["differing"] else ""
    return Row(
        what=f"quantized tensors unlike {stock.name}.convert's, {ours.name}",
        value=found["differing"],
        unit="tensors",
        relation="=",
        bar=0,
        how=f"of {found['tensors']} quantized tensors, bit for bit{such_as}",
    )


def _raw(*series: Series) -> dict[str, object]:
    return {
        one.name: [{k: v for k, v in asdict(run).items() if k != "output"} for run in one.runs]
        for one in series
    }


def _clear(*contenders: Contender) -> None:
    for contender in contenders:
        remove(contender.out)
