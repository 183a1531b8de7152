"""Faults planted into every family: how many are caught, how many named at their module.

    python -m benchmarks.faults                    # one type of each family, 100 clean twins
    python -m benchmarks.faults --types qwen3 --seeds 5

Writes ``faults.md`` and ``faults.json`` beside this file. A fault counts as caught when a report
would fail (the outputs miss the gate) or the row on modules names a place; as named when that place
is the planted module or the innermost module around it whose output both sides shape alike.
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

from benchmarks.machine import describe

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One planted fault, or a clean twin (fault "none")."""

    model_type: str
    seed: int
    fault: str
    planted: str
    found: str
    caught: bool
    named: bool


def families() -> list[str]:
    """One model_type of every text family that transformers has a class for, the first by name."""
    from arch_maps.registry import find, model_types
    from validate.twin import list_examples

    found: dict[tuple[str, ...], str] = {}
    examples = set(list_examples())
    for name in model_types():
        arch = find(name)
        if arch is not None and name in examples and arch.pipeline_tag != "feature-extraction":
            found.setdefault(arch.parts[:1], name)
    return sorted(found.values())


def rows_of(model_type: str, seed: int, *, plant: bool) -> list[Row]:
    """The rows of one twin; nothing where the type has no torch class or writes no text."""
    from benchmarks.planted import Ground
    from validate.reference import lacks_class, read_config
    from validate.runtime import RuntimeRefusal, is_generative, prepare_mlx, runtimes_for
    from validate.twin import load_example, make_twin

    prepare_mlx()
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        make_twin(load_example(model_type), source, seed=seed)
        config = read_config(source)
        if lacks_class(source, trust_remote_code=False) or not is_generative(config):
            return []
        try:
            runtime = (*runtimes_for(config), "")[0]
            ground = Ground(source, out, runtime=runtime)
            clean = ground.locate()
        except (RuntimeRefusal, RuntimeError, ValueError, TypeError) as error:
            return [Row(model_type, seed, "error", "", str(error)[:200], False, False)]
        first = clean.first
        rows = [Row(model_type, seed, "none", "", first.text() if first else "", bool(first), True)]
        if not plant:
            return rows
        for fault in ground.faults():
            where = ground.locate(fault)
            rows.append(
                Row(
                    model_type,
                    seed,
                    fault.name,
                    fault.modules[0],
                    where.first.mlx if where.first else "",
                    where.first is not None,
                    ground.rightly(where, fault.modules),
                )
            )
        other = ground.with_other_base(Path(name) / "other-base")
        if other is not None:
            place = other.first.mlx if other.first else ""
            named = ".0." in f"{place}." or any(w in place for w in ("attn", "attention"))
            rows.append(
                Row(
                    model_type,
                    seed,
                    "wrong rotary base",
                    "the first attention that turns its queries",
                    place,
                    other.first is not None,
                    named and place.rpartition(".")[2] not in ("model", ""),
                )
            )
        return rows


def _task(task: tuple[str, int, bool]) -> list[Row]:
    return rows_of(task[0], task[1], plant=task[2])


def run(types: Sequence[str], seeds: int, jobs: int) -> Iterator[list[Row]]:
    """The rows, twin by twin: faults with seed 0, and ``seeds`` clean twins over all types."""
    tasks = [(name, 0, True) for name in types]
    tasks += [(types[n % len(types)], 1 + n // len(types), False) for n in range(seeds)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_task, tasks)


def table(rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    planted = [r for r in rows if r.fault not in ("none", "error")]
    clean = [r for r in rows if r.fault == "none"]
    kinds = Counter(r.fault for r in planted)
    lines = [
        "# Planted faults",
        "",
        *(f"- {key}: {value}" for key, value in describe().items()),
        "",
        f"{len(planted)} faults in {len({r.model_type for r in planted})} families: "
        f"{sum(r.caught for r in planted)} caught, {sum(r.named for r in planted)} named at their "
        f"module. {len(clean)} clean twins: {sum(r.caught for r in clean)} false alarms.",
        "",
        "| fault | planted | caught | named |",
        "|---|---|---|---|",
    ]
    for kind, count in kinds.items():
        of = [r for r in planted if r.fault == kind]
        lines.append(
            f"| {kind} | {count} | {sum(r.caught for r in of)} | {sum(r.named for r in of)} |"
        )
    missed = [r for r in planted if not r.named] + [r for r in clean if r.caught]
    missed += [r for r in rows if r.fault == "error"]
    if missed:
        lines += ["", "Not caught, named elsewhere, or wrong:", ""]
        lines += ["| type | fault | planted at | found at |", "|---|---|---|---|"]
        lines += [
            f"| {r.model_type} | {r.fault} | {r.planted} | {r.found or '-'} |" for r in missed
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, print the table, write the files; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, default=100, help="clean twins")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    rows: list[Row] = []
    for found in run(given.types or families(), given.seeds, given.jobs):
        rows += found
        for row in found:
            if row.fault == "error" or row.named is False or (row.fault == "none" and row.caught):
                print(row, file=sys.stderr, flush=True)
    (given.out / "faults.md").write_text(table(rows), encoding="utf-8")
    (given.out / "faults.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(table(rows))
    planted = [r for r in rows if r.fault not in ("none", "error")]
    named = sum(r.named for r in planted) >= 0.95 * len(planted)
    alarms = any(r.caught for r in rows if r.fault == "none")
    return 0 if all(r.caught for r in planted) and named and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
