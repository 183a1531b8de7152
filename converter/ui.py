"""What a person sees while a conversion runs: tables, progress, verdicts; all on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from converter.plan.match import ranges
from converter.plan.model import Output, Plan
from quant.recipe import CALIBRATED
from validate.checks import NOT_COMPARED, REFERENCE

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

Tick = Callable[[int, int], None]
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_WIDE: Final = 150
"""Columns of what is no terminal, or a wide one."""


def size_text(count: float) -> str:
    """Bytes for people: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Console:
    """Progress and messages for one run; quiet when asked or when nobody is watching."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Write to stderr, so that stdout holds results only."""
        self.quiet = quiet

    @property
    def rich(self) -> RichConsole:
        """The terminal that messages go to."""
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line; markup in it is not interpreted."""
        if self.quiet:  # rich takes a while to load
            return
        self.rich.print(text, markup=False)

    def planned(self, plans: Sequence[Plan], folders: Sequence[Path]) -> None:
        """One line for each output that is about to be made."""
        for plan, folder in zip(plans, folders, strict=True):
            self.say(
                f"{plan.model_type}: {len(plan.outputs)} tensors, {len(plan.drops)} dropped -> "
                f"{folder} ({size_text(plan.output_bytes)}, "
                f"{plan.bits_per_weight:.2f} bits per weight)"
            )
            for note in plan.notes:
                self.say(f"  note: {note}")

    @contextmanager
    def progress(self, what: str, *, unit: str) -> Iterator[Tick]:
        """A bar for one step; the tick takes (done, total)."""
        if self.quiet:
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description:>9}"), BarColumn(), TextColumn("{task.fields[n]}")]
        with Progress(*columns, TimeRemainingColumn(), console=self.rich, transient=False) as bar:
            task = bar.add_task(what, total=None, n="", visible=False)

            def tick(done: int, total: int) -> None:
                if unit == "bytes":
                    text = f"{size_text(done)} of {size_text(total)}"
                else:
                    text = f"{100 * done / max(1, total):.0f} %"
                bar.update(task, completed=done, total=total, n=text, visible=True)

            yield tick


def plan_width() -> int:
    """Columns for plans on standard output: what a terminal has; files and pipes get it wide."""
    from rich.console import Console as RichConsole

    return min(_WIDE, RichConsole().width) if sys.stdout.isatty() else _WIDE


def plan_tables(plan: Plan, *, workers: int, width: int = _WIDE) -> str:
    """The plan as text of ``width`` columns: tensors by group, drops with reasons, sizes, needs."""
    from io import StringIO

    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    rows = _grouped(plan.outputs)
    whole = ["tensors", "size"]
    if max(map(len, rows), default=0) <= width // 2:
        whole.append("target")  # else names are folded, too; none is ever cut
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("target", "tensors", "made from", "stored as", "size"):
        side: Literal["right", "left"] = "right" if title in ("tensors", "size") else "left"
        table.add_column(title, justify=side, no_wrap=title in whole, overflow="fold")
    for name, (first, count, size) in rows.items():
        made = escape(_made_from(first))  # brackets are lists here, not styles
        table.add_row(name, str(count), made, _stored_as(first), size_text(size))
    buffer = StringIO()
    console = RichConsole(file=buffer, width=width, highlight=False)
    console.print(table)
    if plan.drops:
        drops = Table(box=None, pad_edge=False, header_style="bold")
        drops.add_column("dropped", overflow="fold")
        drops.add_column("reason", overflow="fold")
        for name, reason in collapsed((drop.name, drop.reason) for drop in plan.drops):
            drops.add_row(name, reason)
        console.print()
        console.print(drops)
    for note in plan.notes:
        console.print(f"\nnote: {note}", markup=False, soft_wrap=True)
    largest = max((t.nbytes for shard in plan.shards for t in shard.tensors), default=0)
    console.print(
        f"\n{plan.model_type} ({plan.layout} layout), plan {plan.hash[:12]}\n"
        f"parameters        {plan.parameters:,}\n"
        f"bits per weight   {plan.bits_per_weight:.3f}{_chosen(plan)}\n"
        f"reads             {size_text(plan.source_bytes)}\n"
        f"writes            {size_text(plan.output_bytes)} in {len(plan.shards)} file(s), "
        f"largest tensor {size_text(largest)}\n"
        f"disk needed       {size_text(plan.output_bytes)} beside the source\n"
        f"memory needed     about {size_text(memory_estimate(plan, workers))}{_too_much(plan)}",
        markup=False,
    )
    return buffer.getvalue()


def _too_much(plan: Plan) -> str:
    """That this machine cannot calibrate a plan, where that is so."""
    from converter.memory import installed_memory
    from converter.plan.memory import calibration_bytes

    if calibration_bytes(plan) <= (here := installed_memory()):
        return ""
    return f", more than the {size_text(here)} of this machine: it is refused here"


def _chosen(plan: Plan) -> str:
    """How the formats of an allocation were chosen."""
    found = plan.options.allocation
    if found is None:
        return ""
    if found.basis == "weights":
        return f", formats chosen for {plan.options.target_text} by the weights alone"
    return (
        f", formats chosen for {plan.options.target_text} by activations; "
        f"expected mean KL {found.expected:.3g} nats"
    )


def verdict_text(report: Mapping[str, Any], out: Path) -> str:
    """The checks of a parity report and its verdict, for a terminal."""
    rows = [("", "runtime", "input", "check", "value", "gate")]
    notes: dict[str, None] = {}
    for check in report["checks"]:
        known = check["verdict"] == "fail" or check["name"] in ("deviation", REFERENCE)
        if known and check.get("note"):
            notes[f"{check['name']}: {check['note']}"] = None
        if check["name"] == "loss" and "kl_p999" in check.get("metrics", {}):
            notes[_quality_text(check)] = None
        rows.append(
            (
                str(check["verdict"]),
                str(check.get("runtime") or "").replace("_", "-"),
                str(check["modality"]),
                str(check["name"]),
                _number(check.get("value")),
                _number(check.get("threshold")),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
        + f"  {row[4]:>8}  {row[5]:>8}"
        for row in rows
    ]
    lines += [f"  {note}" for note in notes]
    verdict = str(report["verdict"])
    if verdict == "unproven":
        verdict += f" ({NOT_COMPARED})"
    return "\n".join([*lines, f"parity: {verdict}  {out / 'parity.html'}"])


def _quality_text(check: Mapping[str, Any]) -> str:
    """The figures of a loss row; ``convert compare`` measures them on a longer text."""
    m = {key: _number(value) for key, value in check["metrics"].items()}
    return (
        f"loss in {check['runtime'].replace('_', '-')}, {check['modality']}: perplexity x "
        f"{m['perplexity_ratio']} ± {m['perplexity_ratio_error']}; KL mean {m['kl_mean']} ± "
        f"{m['kl_mean_error']}, median {m['kl_median']}, p90 {m['kl_p90']}, p99 {m['kl_p99']}, "
        f"p99.9 {m['kl_p999']}, max {m['kl_max']}; same top token {m['top1']} ± "
        f"{m['top1_error']}; RMS of probability change {m['moved_rms']}"
    )


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ("-" if value is None else value)


def memory_estimate(plan: Plan, workers: int) -> int:
    """Peak bytes: the interpreter, and a few buffers for each worker; or what calibrating takes."""
    from arch_maps.ops import Source, sources, streamable
    from converter.execute.units import UNIT_BYTES
    from converter.plan.memory import calibration_bytes

    whole = 0
    for out in plan.outputs:
        if not isinstance(out.expr, Source) and not streamable(out.expr):
            elements = 1
            for size in out.expr.shape:
                elements *= int(size)
            whole = max(whole, 8 * elements * len(sources(out.expr)))
    executing = 200_000_000 + workers * max(8 * UNIT_BYTES, whole)
    return max(executing, calibration_bytes(plan))


def _grouped(outputs: Sequence[Output]) -> dict[str, tuple[Output, int, int]]:
    """Outputs that differ only in their layer number, under one collapsed name.

    The first of them, how many they are, and the bytes of all.
    """
    groups: dict[tuple[str, str, str], _Group] = {}
    search = _INDEX.search
    for out in outputs:
        before, number, after = out.rule.target, "", ""
        if found := search(before):
            start, stop = found.span()
            before, number, after = before[:start], before[start:stop], before[stop:]
        key = (before, _without_indices(after), _stored_as(out))
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(out)
        group.numbers.append(number)
        for tensor in out.stored.values():
            group.nbytes += tensor.nbytes
    named: dict[str, tuple[Output, int, int]] = {}
    for (before, after, _), group in groups.items():
        numbers = sorted({int(number) for number in group.numbers if number})
        name = _fill(f"{before}{{}}{after}" if numbers else before, numbers)
        found_so_far = (group.first, len(group.numbers), group.nbytes)
        named[name if name not in named else f"{name} "] = found_so_far
    return named


class _Group:
    """Outputs of one row: the first, their layer numbers, and their bytes."""

    __slots__ = ("first", "nbytes", "numbers")

    def __init__(self, first: Output) -> None:
        self.first, self.nbytes = first, 0
        self.numbers: list[str] = []


@lru_cache(maxsize=4096)  # layers repeat each other
def _without_indices(name: str) -> str:
    return _INDEX.sub("{}", name)


def collapsed(drops: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, reason) of dropped tensors, those that differ in their layer number as one."""
    seen: dict[tuple[str, str], list[int]] = {}
    for name, reason in drops:
        key = (_INDEX.sub("{}", name), reason)
        seen.setdefault(key, []).extend(int(n) for n in _INDEX.findall(name)[:1])
    return [(_fill(name, numbers), reason) for (name, reason), numbers in seen.items()]


def quantization_text(data: Mapping[str, Any]) -> str:
    """The weights of a manifest's output in words; empty where they are not quantized."""
    recipe = data["recipe"]
    quant = recipe["quantization"]
    if quant is None:
        return ""
    mixed = f", {recipe['predicate']}" if recipe["predicate"] else ""
    bits = f"{data['bits_per_weight']:.2f} bits per weight"
    method = ""
    if quant.get("method") in CALIBRATED and (text := recipe.get("calibration")):
        pictures = " and pictures" if text.get("pictures") else ""
        method = f", {quant['method']} on {text['sequences']} x {text['length']} tokens{pictures}"
    if recipe.get("target_size"):
        basis = (recipe.get("allocation") or {}).get("basis", "")
        chosen = {"activations": " by activations", "weights": " by the weights"}.get(basis, "")
        return f"formats chosen for each matrix{chosen}, {bits}{method}"
    return (
        f"{quant['bits']}-bit {quant['mode']}, group size {quant['group_size']}{mixed}, "
        f"{bits}{method}"
    )


def recipe_facts(data: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a manifest's weights, for a card: for a target size not one format for all."""
    recipe = data["recipe"]
    quant = dict(recipe["quantization"] or {})
    if recipe.get("target_size"):
        quant = {"method": quant.get("method")}
        quant |= {k: v for k, v in recipe["target_size"].items() if v is not None}
        quant |= {"chosen by": (recipe.get("allocation") or {}).get("basis")}
    return quant


def _fill(pattern: str, numbers: list[int]) -> str:
    if not numbers:
        return pattern
    return pattern.replace("{}", f"{{{ranges(sorted(set(numbers)))}}}", 1).replace("{}", "*")


def _made_from(out: Output) -> str:
    from arch_maps.ops import Source, describe

    text = "the same name" if isinstance(out.expr, Source) else describe(out.expr)
    if isinstance(out.expr, Source) and out.expr.name != out.rule.target:
        text = out.expr.name
    numbers = [int(n) for n in _INDEX.findall(out.rule.target)[:1]]
    return re.sub(rf"\.{numbers[0]}\.", ".N.", text) if numbers else text


def _stored_as(out: Output) -> str:
    quant = out.quant
    if quant is None:
        return f"{out.dtype} ({out.kept})" if out.kept else out.dtype
    return f"{quant.mode} {quant.bits}-bit g{quant.group_size}"
