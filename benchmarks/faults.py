"""Faults planted into every family: how many are caught, how many named at their module.

    python -m benchmarks.faults                    # one type of each family, 100 clean twins
    python -m benchmarks.faults --only qwen3 llava --seeds 5
    python -m benchmarks.faults --resume           # what faults.json has not yet

A family is a text part, or the towers and projectors of pictures and sounds. Writes ``faults.json``
after each twin and ``faults.md`` beside this file. A fault counts as caught when a report would
fail (the outputs miss the gate) or the row on modules names a place; as named when that place is
the planted module or the innermost module around it whose output both sides shape alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import describe

if TYPE_CHECKING:
    from benchmarks.ground import Ground
    from validate.where.compare import Where

HERE = Path(__file__).parent
_ERROR, _NONE, _UNJUDGED = "error", "none", "not judged"
_NO_FAULT = (_ERROR, _NONE, _UNJUDGED)
_EMBEDS = ("feature-extraction", "sentence-similarity")
_KINDS = ("text", "image", "audio")


@dataclass(frozen=True)
class Family:
    """Types that share a part, the first by name first, and the kinds of prompts it answers."""

    types: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One planted fault, or a clean twin (fault "none")."""

    model_type: str
    kind: str
    seed: int
    fault: str
    planted: str
    found: str
    error: float
    """How far the outputs are from the reference's, relative to the largest."""
    caught: bool
    named: bool


def families() -> list[Family]:
    """Every text part, and every set of towers and projectors, of the shipped types.

    Types that write text stand before those that embed it.
    """
    from arch_maps.registry import find, model_types
    from validate.twin import list_examples

    texts: dict[str, list[str]] = {}
    media: dict[tuple[str, ...], list[str]] = {}
    kinds: dict[tuple[str, ...], tuple[str, ...]] = {}
    examples = set(list_examples())
    known = [(name, arch) for name in model_types() if (arch := find(name)) and name in examples]
    for name, arch in sorted(known, key=lambda one: one[1].pipeline_tag in _EMBEDS):
        if "text" in arch.modalities:
            texts.setdefault(arch.parts[0], []).append(name)
        towers = tuple(part for part in arch.parts if not part.startswith("text."))
        heard = tuple(kind for kind in _KINDS[1:] if kind in arch.modalities)
        if towers and heard:
            media.setdefault(towers, []).append(name)
            kinds[towers] = heard
    found = [Family(tuple(types), ("text",)) for types in texts.values()]
    found += [Family(tuple(types), kinds[towers]) for towers, types in media.items()]
    return found


def rows_of(family: Family, seed: int, *, plant: bool) -> list[Row]:
    """The rows of one twin: of the family's first type that torch and a runtime both have."""
    for model_type in family.types:
        rows = _rows_of(model_type, family.kinds, seed, plant=plant)
        if rows:
            return rows
    return []


def _rows_of(model_type: str, kinds: Sequence[str], seed: int, *, plant: bool) -> list[Row]:
    from benchmarks.ground import Ground
    from validate.reference import lacks_class, read_config
    from validate.runtime import RuntimeRefusal, prepare_mlx, runtimes_for
    from validate.twin import load_example, make_twin

    prepare_mlx()
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        make_twin(load_example(model_type), source, seed=seed)
        if lacks_class(source, trust_remote_code=False):
            return []
        rows: list[Row] = []
        kind = kinds[0]
        try:
            runtime = (*runtimes_for(read_config(source)), "mlx_vlm")[0]
            ground = Ground(source, out, runtime=runtime, kinds=kinds)
            for kind in kinds:
                if kind in ground.unjudged:
                    why = ground.unjudged[kind].replace(str(source), model_type)
                    why = " ".join(why.split())[:160]
                    rows.append(Row(model_type, kind, seed, _UNJUDGED, "", why, 0.0, False, True))
                    continue
                rows.append(_row(model_type, kind, seed, _NONE, "", ground.locate(kind=kind), True))
                if plant:
                    rows += _planted(ground, model_type, kind, seed, Path(name))
        except RuntimeRefusal as error:
            if error.needs_metal:
                return []
            rows.append(_failed(model_type, kind, seed, error))
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            rows.append(_failed(model_type, kind, seed, error))
        return rows


def _failed(model_type: str, kind: str, seed: int, error: Exception) -> Row:
    text = f"{type(error).__name__}: {error}"[:300]
    return Row(model_type, kind, seed, _ERROR, "", text, 0.0, False, False)


def _planted(ground: Ground, model_type: str, kind: str, seed: int, scratch: Path) -> Iterator[Row]:
    for fault in ground.faults(kind):
        where = ground.locate(fault, kind)
        named = ground.rightly(where, fault.modules)
        yield _row(model_type, kind, seed, fault.name, fault.modules[0], where, named)
    other = ground.with_other_base(scratch / f"other-base-{kind}", kind)
    if other is not None:
        place = other.first.mlx if other.first else ""
        named = ".0." in f"{place}." or any(w in place for w in ("attn", "attention"))
        named = named and place.rpartition(".")[2] not in ("model", "")
        planted = "the first attention that turns its queries"
        yield _row(model_type, kind, seed, "wrong rotary base", planted, other, named)


def _row(
    model_type: str, kind: str, seed: int, fault: str, planted: str, where: Where, named: bool
) -> Row:
    from validate.checks import EXACT

    first = where.first
    found = "" if first is None else first.text() if fault == _NONE else first.mlx or "(the model)"
    caught = first is not None or not where.outputs <= EXACT
    return Row(model_type, kind, seed, fault, planted, found, where.outputs, caught, named)


Task = tuple[Family, int, bool]


def _task(task: Task) -> tuple[Task, list[Row]]:
    family, seed, plant = task
    return task, rows_of(family, seed, plant=plant)


def tasks(chosen: Sequence[Family], clean: int, done: Sequence[Row]) -> list[Task]:
    """Faults with seed 0, then ``clean`` further twins over all families, without those done."""
    wanted: list[Task] = [(family, 0, True) for family in chosen]
    wanted += [(chosen[n % len(chosen)], 1 + n // len(chosen), False) for n in range(clean)]
    have = {(row.model_type, row.kind, row.seed) for row in done}
    return [
        task
        for task in wanted
        if not any((name, task[0].kinds[-1], task[1]) in have for name in task[0].types)
    ]


def run(wanted: Sequence[Task], jobs: int) -> Iterator[list[Row]]:
    """The rows, twin by twin."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for _, rows in pool.map(_task, wanted):
            yield rows


def table(rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    planted = [r for r in rows if r.fault not in _NO_FAULT]
    clean = [r for r in rows if r.fault == _NONE]
    lines = ["# Planted faults", "", *(f"- {key}: {value}" for key, value in describe().items())]
    twins = {(r.model_type, r.seed) for r in clean}
    kinds = Counter(r.kind for r in clean)
    counted = ", ".join(f"{kinds[kind]} of {kind}" for kind in _KINDS if kinds[kind])
    lines += [
        "",
        f"{len(planted)} faults in {len({(r.model_type, r.kind) for r in planted})} families: "
        f"{sum(r.caught for r in planted)} caught, {sum(r.named for r in planted)} named at their "
        f"module. {len(twins)} clean twins ({counted}): {sum(r.caught for r in clean)} false "
        "alarms.",
        "",
        "| prompt | fault | planted | caught | named |",
        "|---|---|---|---|---|",
    ]
    for kind in _KINDS:
        for fault in dict.fromkeys(r.fault for r in planted if r.kind == kind):
            of = [r for r in planted if (r.kind, r.fault) == (kind, fault)]
            lines.append(
                f"| {kind} | {fault} | {len(of)} | {sum(r.caught for r in of)} | "
                f"{sum(r.named for r in of)} |"
            )
    missed = [r for r in planted if not r.named or not r.caught] + [r for r in clean if r.caught]
    missed += [r for r in rows if r.fault == _ERROR]
    if missed:
        lines += ["", "Not caught, named elsewhere, or wrong:", ""]
        lines += ["| type | prompt | fault | planted at | found at | outputs off by |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {r.model_type} | {r.kind} | {r.fault} | {r.planted} | {r.found or '-'} | "
            f"{r.error:.1e} |"
            for r in missed
        ]
    lines += ["", "Families, by the type that stood for them:", ""]
    for kind in _KINDS:
        names = sorted({r.model_type for r in planted if r.kind == kind})
        lines += [f"- {kind}: {', '.join(names)}"] if names else []
    left = {(r.model_type, r.kind): r.found for r in rows if r.fault == _UNJUDGED}
    lines += [f"- {kind} of {name}, not judged here: {why}" for (name, kind), why in left.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, print the table, write the files; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None, help="the families of these types")
    parser.add_argument("--seeds", type=int, default=100, help="clean twins")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the rows of faults.json")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    file = given.out / "faults.json"
    rows: list[Row] = []
    if given.resume and file.exists():
        rows = [row for row in (Row(**r) for r in json.loads(file.read_text()))]
        rows = [row for row in rows if row.fault != _ERROR]
    chosen = families()
    if given.only is not None:
        chosen = [
            Family((name,), family.kinds)
            for name in given.only
            for family in chosen
            if name in family.types
        ]
    for found in run(tasks(chosen, given.seeds, rows), given.jobs):
        rows += found
        file.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        for row in found:
            if row.fault == _ERROR or row.named is False or (row.fault == _NONE and row.caught):
                print(row, file=sys.stderr, flush=True)
    (given.out / "faults.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))
    planted = [r for r in rows if r.fault not in _NO_FAULT]
    named = sum(r.named for r in planted) >= 0.95 * len(planted)
    wrong = any(r.caught if r.fault == _NONE else r.fault == _ERROR for r in rows)
    return 0 if all(r.caught for r in planted) and named and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
