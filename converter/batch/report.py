"""All runs and jobs as one self-contained HTML page, readable without a server or scripts."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from converter.atomic import write_named
from converter.batch.catalogue import Catalogue
from converter.batch.status import iso, rows_of
from converter.ui import size_text

WIDTH: Final = 720.0
HEIGHT: Final = 180.0
_DECADES: Final = (-8, -3)
_EXACT: Final = 1e-4
_ORDER: Final = ("running", "queued", "waiting", "published", "parked", "quarantined")


def write_report(catalogue: Catalogue, out: Path) -> None:
    """Write the page; it appears whole or not at all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("converter.batch", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"size": size_text, "number": _number}
    text = environment.get_template("report.html.j2").render(page_of(catalogue))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_named(out, text)


def page_of(catalogue: Catalogue) -> dict[str, Any]:
    """Everything that the page shows, as plain data."""
    rows = rows_of(catalogue.entries(superseded=True))
    now = [row for row in rows if row["state"] != "superseded"]
    attempts = catalogue.attempts()
    spent: dict[int, float] = {}
    for one in attempts:
        spent[one.job_id] = spent.get(one.job_id, 0.0) + one.ended - one.started
    for row in now:
        row["seconds"] = spent.get(row["job"])
    counted = Counter(row["state"] for row in now)
    failing = [row for row in now if row["class"] and row["state"] != "published"]
    return {
        "written": iso(time.time()),
        "states": [(state, counted[state]) for state in _ORDER if counted[state]],
        "rows": now,
        "published_bytes": sum(
            row["facts"].get("output_bytes") or 0 for row in now if row["state"] == "published"
        ),
        "classes": Counter(row["class"] for row in failing).most_common(),
        "troubles": Counter(one.outcome for one in attempts if one.outcome != "ok").most_common(),
        "runs": [
            {
                "started": iso(one.started),
                "minutes": None if one.ended is None else (one.ended - one.started) / 60,
                "host": one.host,
                "watchlist": one.watchlist,
                "status": one.status,
                "summary": one.summary,
            }
            for one in catalogue.runs()
        ],
        "trend": trend(rows),
        "width": WIDTH,
        "height": HEIGHT,
        "gate": _height(_EXACT),
        "ticks": [(f"1e{n}", _height(10.0**n)) for n in range(_DECADES[0], _DECADES[1] + 1)],
    }


def trend(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Worst relative error of each judged output in the order of judging, as points of a chart."""
    judged = [row for row in rows if _error(row) is not None]
    judged.sort(key=lambda row: str(row["updated"]))
    step = WIDTH / max(1, len(judged))
    return [
        {
            "x": round((index + 0.5) * step, 2),
            "y": _height(_error(row) or 0.0),
            "name": f"{row['target']} {row['updated']}: {_number(_error(row))}",
            "good": (row["facts"]["parity"] or {}).get("verdict") != "fail",
        }
        for index, row in enumerate(judged)
    ]


def _error(row: dict[str, Any]) -> float | None:
    error = (row["facts"].get("parity") or {}).get("error")
    return float(error) if isinstance(error, int | float) else None


def _height(error: float) -> float:
    """Pixels from the top for an error, on a logarithmic axis that ends are clipped to."""
    low, high = _DECADES
    place = (math.log10(max(error, 10.0**low)) - low) / (high - low)
    return round(HEIGHT * (1 - min(1.0, place)), 2)


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else ""
