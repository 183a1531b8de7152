"""The parity matrix: every mapped type's twin, converted and run beside the stock converters.

``python -m benchmarks.matrix [TYPE | TYPE:VARIANT ...]`` makes the twin of each type, and of each
variant that has an example of its own, as published checkpoints spell their config and as
transformers 5 saves it, converts both, judges text, images and sounds in every runtime that knows
the type, judges what the stock converter makes of the first one, and restores it with
``--to torch``. It writes docs/parity-matrix.md and docs/parity-matrix.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.matrix_stock import (
    EQUAL,
    loaded_equal,
    run_stock,
    tensors_equal,
    under_own_name,
)

ROOT = Path(__file__).parents[1]
TEXT = ("logits", "hidden")
KINDS = ("image", "audio", "video")
MEDIA = {f"{kind}/{what}": kind for kind in KINDS for what in ("logits", "hidden")}
DECODE = "decode"
ALONE = {"prefill = decode": DECODE}
_CELL = 90
LIMIT_S = 600  # some towers have their size in the runtime's code
COMPARED = ("mlx", "mlx-vlm", "mlx-lm", "torch", "transformers")
VISION = ("torchvision", "timm")
NEEDS_VISION = (
    *("gemma3n", "gemma4_unified", "inkling_mm_model", "kimi_k25", "lfm2_vl", "llama4"),
    *("mistral3", "molmo2", "muse_glimmer", "nemotron_h_omni", "nemotron_h_omni:super-vl"),
    *("phi4mm", "pixtral"),
)
"""Types whose release's processor or tower needs one of these libraries."""


def main() -> None:
    from arch_maps.registry import model_types
    from validate.twin import list_variants

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types or type:variant; default: all")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--torchvision",
        action="store_true",
        help="the types whose pictures need torchvision or timm, in files of their own",
    )
    given = parser.parse_args()
    if given.torchvision and (missing := [name for name in VISION if find_spec(name) is None]):
        parser.error(f"{', '.join(missing)}: not installed; see the extra 'vision'")
    started = time.perf_counter()
    every = NEEDS_VISION if given.torchvision else (*model_types(), *list_variants())
    limit = 3 * LIMIT_S if given.torchvision else LIMIT_S
    rows = measure(given.types or list(every), jobs=given.jobs, limit_s=limit)
    compared = versions(COMPARED + VISION) if given.torchvision else versions()
    stem = "parity-matrix-torchvision" if given.torchvision else "parity-matrix"
    kept = given.docs / f"{stem}.json"
    if given.types and kept.exists():  # a partial run renews its own rows only
        renewed = {row["model_type"] for row in rows}
        old = json.loads(kept.read_text())["rows"]
        rows = sorted(
            [row for row in old if row["model_type"] not in renewed] + rows,
            key=lambda row: str(row["model_type"]),
        )
    if given.docs == ROOT / "docs" and not given.torchvision:
        from benchmarks import evidence

        evidence.write(rows, compared)
    kept.write_text(json.dumps({"versions": compared, "rows": rows}, indent=1) + "\n")
    body = vision_table(rows, compared) if given.torchvision else table(rows)
    kept.with_suffix(".md").write_text(body)
    print(f"{len(rows)} types and variants, {time.perf_counter() - started:.0f} s")


def measure(types: list[str], *, jobs: int, limit_s: int = LIMIT_S) -> list[dict[str, Any]]:
    """One row for each type, each in a fork of a process that has the heavy imports loaded."""
    # As many processes as cores run beside each other: threads of their own would only wait for
    # each other (measured: three times the time). Read when the fork server loads its libraries.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.matrix_imports"])
    rows: list[dict[str, Any]] = []
    waiting, running = list(types), list[Any]()
    while waiting or running:
        while waiting and len(running) < jobs:
            receive, send = context.Pipe(duplex=False)
            name = waiting.pop(0)
            process = context.Process(target=_child, args=(name, send))
            process.start()
            send.close()
            running.append((name, process, receive, time.monotonic()))
        for entry in list(running):
            name, process, receive, since = entry
            row: dict[str, Any] | None = None
            if receive.poll(0.05):
                try:
                    row = receive.recv()
                except EOFError:
                    row = {"model_type": name, "error": f"the process died ({process.exitcode})"}
            elif time.monotonic() - since > limit_s:
                process.kill()
                row = {"model_type": name, "error": f"no answer in {limit_s} s"}
            if row is not None:
                process.join()
                running.remove(entry)
                rows.append(row)
                print(one_line(row), flush=True)
    return sorted(rows, key=lambda row: str(row["model_type"]))


def _child(model_type: str, answer: Any) -> None:
    import torch

    torch.set_num_threads(1)
    answer.send(row_of(model_type))
    answer.close()


def row_of(name: str) -> dict[str, Any]:
    """Everything the matrix says of one type, or of one ``type:variant``."""
    from arch_maps.registry import find
    from validate.stand_ins import stand_in
    from validate.twin import load_example, make_twin

    model_type, _, variant = name.partition(":")
    arch = find(model_type)
    assert arch is not None
    row: dict[str, Any] = {
        "model_type": name,
        "parts": list(arch.parts),
        "modalities": list(arch.modalities),
        "remarks": [] if variant else list(arch.remarks),
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            twin = make_twin(load_example(name), folder / "twin")
            row["published"] = _ours(folder / "twin", folder / "ours")
            row["restored"] = _restored(folder / "twin", folder / "ours", folder / "back")
            if twin.from_map:
                row["transformers"] = {"verdict": "no class"}
                row["stock"] = _stock_tensors(folder / "twin", folder / "ours", folder / "stock")
            elif stand_in(twin.config):  # which transformers saves as the other type
                row["transformers"] = {"verdict": "other type"}
                row["stock"] = _stock(folder / "twin", folder / "stock")
            else:
                saved = _resaved(folder / "twin", folder / "saved")
                row["transformers"] = _ours(saved, folder / "two")
                row["stock"] = _stock(folder / "twin", folder / "stock")
        except Exception as error:
            row["error"] = _short(error)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def _ours(source: Path, out: Path) -> dict[str, Any]:
    from converter.pipeline import Request, convert
    from converter.proof import prove
    from converter.ui import Console

    quiet = Console(quiet=True)
    try:
        done = convert(Request(hf_path=str(source), mlx_path=out), quiet)
        return summary(prove(out, source=source, console=quiet, plan=done[0].plan))
    except Exception as error:
        return {"verdict": "error", "error": _short(error)}


def _stock(source: Path, out: Path) -> dict[str, Any]:
    """What the stock converter makes of the release, judged the same way."""
    from converter.proof import prove
    from converter.ui import Console
    from validate.reference import read_config
    from validate.runtime import runtimes_for

    runtimes = runtimes_for(read_config(source))
    if not runtimes:
        return {"verdict": "error", "error": "no stock runtime knows the type"}
    mine = runtimes[0]
    try:
        run_stock(source, out, runtime=mine)
    except Exception as error:
        return {"verdict": "error", "error": _short(error)}
    try:
        found = summary(prove(out, source=source, console=Console(quiet=True)))
    except Exception as error:
        return {"verdict": "error", "error": _short(error)}
    own = found["runtimes"].get(mine, {"failed": True})  # the runtime it was converted for
    verdict = "fail" if own.get("failed") else "pass"
    return {**found, "runtimes": {mine: own}, "verdict": verdict}


def _stock_tensors(source: Path, ours: Path, out: Path) -> dict[str, Any]:
    """Whether our tensors are the stock converter's, where there is no torch class to judge by."""
    from validate.reference import read_config
    from validate.runtime import runtimes_for

    runtimes = runtimes_for(read_config(source))
    if not runtimes:
        return {"verdict": "error", "error": "no stock runtime knows the type"}
    tensors = _beside_stock(source, ours, out, runtimes[0])
    renamed = None if tensors == EQUAL else under_own_name(source, out.with_name("renamed"))
    if renamed is not None:
        name = read_config(renamed)["model_type"]
        found = _beside_stock(renamed, ours, out.with_name("stock-renamed"), runtimes[0])
        tensors = f"{tensors}; called {name}: {found}"
    return {"verdict": "unproven", "tensors": tensors}


def _beside_stock(source: Path, ours: Path, out: Path, runtime: str) -> str:
    try:
        run_stock(source, out, runtime=runtime)
        tensors = tensors_equal(ours, out)
    except Exception as error:
        tensors = _short(error)[:_CELL]
    if tensors == EQUAL:
        return tensors
    alone = loaded_equal(ours, source, runtime=runtime)
    return f"{tensors} (its loader alone: {alone[:_CELL]})"


def _resaved(source: Path, out: Path) -> Path:
    """The release as transformers 5 writes it, with everything that is not weights or config."""
    import transformers
    from safetensors.torch import load_file, save_file

    from validate.reference import borrowed_settings
    from validate.torch_faults import mend, unbuilt

    config = json.loads((source / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    mend(config["model_type"])
    model = cls.from_pretrained(source, **borrowed_settings(cls, config))
    model.save_pretrained(out)
    if missing := unbuilt(config["model_type"]):
        file = "model.safetensors"
        kept = {n: t for n, t in load_file(source / file).items() if n.startswith(missing)}
        save_file(load_file(out / file) | kept, out / file, metadata={"format": "pt"})
    for path in source.iterdir():
        if not (out / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    return out


def _restored(source: Path, out: Path, back: Path) -> str:
    """Whether ``--to torch`` gives the release's tensors back."""
    import numpy as np

    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.source import open_folder
    from converter.ui import Console

    try:
        recipe = Options(target="torch")
        convert(Request(hf_path=str(out), mlx_path=back, recipes=(recipe,)), Console(quiet=True))
    except Exception as error:
        return f"no: {_short(error)}"
    first, second = open_folder(source), open_folder(back)
    lost = [name for name in first.tensors if name not in second.tensors]
    changed = added = 0
    with first.open() as ours, second.open() as theirs:
        for name in second.tensors:
            if name not in first.tensors:  # a head that the release ties, or the names of a kin
                added += 1
                continue
            left, right = ours.read(name), theirs.read(name)
            if left.tobytes() != right.tobytes():
                close = np.allclose(left.astype(np.float32), right.astype(np.float32), atol=1e-6)
                if not close:
                    return f"no: {name} differs"
                changed += 1
    words = ["bit for bit" if not changed else f"{changed} norms within rounding"]
    words += [f"{len(lost)} dropped"] if lost else []
    return ", ".join(words + ([f"{added} more"] if added else []))


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The worst figures by runtime, and the notes of what failed."""
    runtimes: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for check in report["checks"]:
        entry = runtimes.setdefault(check.get("runtime") or "-", {})
        name, value = check["name"], check.get("value")
        if isinstance(value, int | float):
            kind = "text" if name in TEXT else MEDIA.get(name, ALONE.get(name, name))
            if kind in ("text", *KINDS, DECODE, "deviation"):
                entry[kind] = max(entry.get(kind, 0.0), value)
        if check["verdict"] == "fail":
            entry["failed"] = True
            notes.append(f"{check.get('runtime')}: {name}: {check.get('note') or value}"[:200])
        elif name == "deviation":
            notes.append(str(check.get("note"))[:200])
    return {
        "verdict": report["verdict"],
        "runtimes": runtimes,
        "notes": list(dict.fromkeys(notes))[:6],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The matrix as Markdown."""
    lines = [
        "# Parity matrix",
        "",
        "Twins in float32 on CPU against torch; the gate is 1e-4 of the largest logit. `text`,",
        "`image`, `audio` and `video` are the worst of a prefill, `decode` is step by step. A",
        "video is prepared by the runtime for both sides. *Published* twins",
        "carry the config as releases spell it, *transformers 5* is the same model loaded and",
        "saved by transformers. *Stock* is the runtime's own converter on the published twin.",
        "`type:variant` is another release of the type, one that takes other branches of its code.",
        "Made by `make parity-matrix`; the figures of every runtime are in parity-matrix.json.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        "",
        f"Published: {_passing(rows, 'published')} of {len(rows)} types and variants pass; "
        f"transformers 5: {_passing(rows, 'transformers')}; stock converter: "
        f"{_passing(rows, 'stock')}. {_unproven(rows)} have no class in transformers, so they are",
        "*unproven*: their twins are made from the map and run in the runtime, where `decode` is",
        "against its own prefill, and their tensors are compared with the stock converter's.",
        "",
        *_cells(rows),
        *_remarks(rows),
    ]
    from arch_maps.unmapped import RUNTIME_ONLY, UNMAPPED

    lines += ["", "## Without a map", "", "Known to transformers and to a runtime:", ""]
    lines += [f"- **{name}**: {reason}." for name, reason in sorted(UNMAPPED.items())]
    lines += ["", "Known to a runtime alone:", ""]
    lines += [f"- **{name}**: {reason}." for name, reason in sorted(RUNTIME_ONLY.items())]
    return "\n".join(lines) + "\n"


def vision_table(rows: list[dict[str, Any]], compared: dict[str, str]) -> str:
    """The rows of types whose pictures need torchvision or timm, as Markdown."""
    lines = [
        "# Parity matrix with torchvision",
        "",
        "The types of the [parity matrix](parity-matrix.md) whose release prepares pictures with",
        "torchvision, or has a tower from timm, measured where both are installed: the reference",
        "is fed what the release's own processor makes. Where the runtime's processor makes",
        "something else, that is a documented deviation, and the gated row is judged with the",
        "reference's pictures in both models.",
        "Made by `python -m benchmarks.matrix --torchvision`.",
        "",
        ", ".join(f"{name} {version}" for name, version in compared.items()) + ".",
        "",
        *_cells(rows),
        *_remarks(rows),
    ]
    return "\n".join(lines) + "\n"


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| type | published | text | decode | image | audio | video | transformers 5 | stock "
        "| to torch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row.get("published") or {}
        cells = [
            row["model_type"],
            ours.get("verdict", "error"),
            _worst(ours, "text"),
            _worst(ours, "decode"),
            _worst(ours, "image"),
            _worst(ours, "audio"),
            _worst(ours, "video"),
            (row.get("transformers") or {}).get("verdict", "error"),
            _stock_cell(row.get("stock") or {}),
            str(row.get("restored", "-")),
        ]
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    return lines


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    remarks = [
        f"- **{row['model_type']}**: {text}"
        for row in rows
        for text in dict.fromkeys(
            [
                *row.get("remarks", ()),
                *(row.get("published") or {}).get("notes", ()),
                *([row["error"]] if "error" in row else ()),
                *(
                    [f"the converter: {row['published']['error']}"]
                    if "error" in (row.get("published") or {})
                    else ()
                ),
            ]
        )
    ]
    return ["", "## Remarks", "", *remarks] if remarks else []


def one_line(row: dict[str, Any]) -> str:
    """Progress of the run."""
    words = [
        (row.get(key) or {}).get("verdict", "-") for key in ("published", "transformers", "stock")
    ]
    return f"{row['model_type']:22} {' '.join(f'{w:6}' for w in words)} {row.get('error', '')}"


def versions(names: tuple[str, ...] = COMPARED) -> dict[str, str]:
    """What was compared."""
    from converter.manifest import installed_versions

    return installed_versions(names)


def _passing(rows: list[dict[str, Any]], key: str) -> int:
    return sum((row.get(key) or {}).get("verdict") == "pass" for row in rows)


def _unproven(rows: list[dict[str, Any]]) -> int:
    return sum((row.get("published") or {}).get("verdict") == "unproven" for row in rows)


def _worst(result: dict[str, Any], kind: str) -> str:
    found = [entry[kind] for entry in result.get("runtimes", {}).values() if kind in entry]
    return f"{max(found):.1e}" if found else "-"


def _stock_cell(stock: dict[str, Any]) -> str:
    if "tensors" in stock:
        return f"tensors: {stock['tensors']}"
    if stock.get("verdict") == "pass":
        return f"pass {_worst(stock, 'text')}"
    if stock.get("verdict") == "fail":
        return (
            f"wrong: {_worst(stock, 'text')}" if _worst(stock, "text") != "-" else "does not load"
        )
    return str(stock.get("error", "-"))[:80]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:240]


if __name__ == "__main__":
    main()
