"""arch_maps/evidence.json: the parity matrix and the fixtures, as `convert maps list` says them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATH = ROOT / "arch_maps" / "evidence.json"
_KINDS = ("text", "decode", "image", "audio", "video")


def write(rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """Renew the file from the rows of a matrix."""
    from arch_maps.registry import model_types

    by_type: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_type.setdefault(str(row["model_type"]).partition(":")[0], []).append(row)
    types = {name: _entry(name, by_type.get(name, [])) for name in model_types()}
    body = {"versions": versions, "types": types}
    PATH.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _entry(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    own = next((row for row in rows if row["model_type"] == name), {})
    published = own.get("published") or {}
    fixtures = sorted(path.stem for path in (ROOT / "tests" / "headers" / name).glob("*.json"))
    return {
        "fixtures": fixtures,
        "twins": [_verdicts(row) for row in sorted(rows, key=lambda row: row["model_type"])],
        "restored": str(own.get("restored", "not measured")),
        "parity": published.get("verdict", "not measured"),
        "errors": [
            f"{kind} {max(found):.1e}"
            for kind in _KINDS
            if (found := [r[kind] for r in published.get("runtimes", {}).values() if kind in r])
        ],
    }


def _verdicts(row: dict[str, Any]) -> str:
    both = [(row.get(key) or {}).get("verdict", "error") for key in ("published", "transformers")]
    return f"{row['model_type'].partition(':')[2]}: {' / '.join(both)}".removeprefix(": ")
