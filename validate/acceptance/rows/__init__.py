"""All rows, in the order in which they run."""

from typing import Final

from validate.acceptance.model import Row
from validate.acceptance.rows import (
    caching,
    chat_ui,
    drafting,
    generate,
    prompting,
    serving,
    tuning,
)

ROWS: Final[tuple[Row, ...]] = tuple(
    sorted(
        (
            *generate.ROWS,
            *prompting.ROWS,
            *serving.ROWS,
            *caching.ROWS,
            *drafting.ROWS,
            *tuning.ROWS,
            *chat_ui.ROWS,
        ),
        key=lambda row: row.runtime != "mlx_vlm",
    )
)
