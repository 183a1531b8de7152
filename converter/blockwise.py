"""Whether a proof fits into memory, and what it reads where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from arch_maps.registry import ArchMap
from converter.memory import available_memory
from converter.plan import Plan
from converter.source import open_folder
from converter.written import as_released, unwritten_weights
from validate.streamed.tensors import Streaming, Tensors, whole_run_bytes


@contextmanager
def blockwise(
    out: Path,
    source: Path,
    *,
    plan: Plan | None = None,
    arch: ArchMap | None = None,
    limit: int | None = None,
    alone: bool = False,
) -> Iterator[Streaming | None]:
    """What a proof of ``out`` reads block by block; None where it fits into memory whole.

    ``source`` is the plain release, ``limit`` the bytes that it may take, None for those available.
    A runtime that is judged ``alone`` is held against no weights.
    """
    release = open_folder(source)
    shapes = {name: info.shape for name, info in release.tensors.items()}
    needed = whole_run_bytes(shapes)
    limit = available_memory() if limit is None else limit
    if needed <= limit:
        yield None
        return
    with ExitStack() as stack:
        exact = None
        if not alone and not as_released(out, plan, arch):
            folder, reader = stack.enter_context(unwritten_weights(out, source, arch=arch))
            exact = Tensors(
                folder=folder, reader=reader, shapes=reader.shapes, dtypes=reader.dtypes
            )
        theirs = Tensors(
            folder=source,
            reader=stack.enter_context(release.open()),
            shapes=shapes,
            dtypes={name: info.dtype for name, info in release.tensors.items()},
        )
        yield Streaming(source=theirs, exact=exact, needed=needed, limit=limit)
