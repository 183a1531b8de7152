"""Compiled kernels as object files: found again by what they were made from, bound by llvmlite."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from quant.compiled import Compiled

_LAYOUT: Final = 2
"""Raise when what is kept, or how a kernel is called, changes."""
_RUNTIME: Final = ("NRT_", "Py", "numba_")
"""How symbols start that only numba's own runtime could give; the C library's are always there."""
_HOMES: Final = ("numpy", "math", "builtins")
"""Where modules, types and functions that kernels mention may come from: they do not change."""
_engines: list[Any] = []  # they own the code


@dataclass(frozen=True, slots=True)
class Bound:
    """Machine code in this process."""

    address: int
    returns: str
    """The type of number that it returns, by numpy's name; empty for none."""


def find(
    kernel: Compiled, types: Sequence[str], *, make: Callable[[], tuple[str, str, str]]
) -> Bound:
    """``kernel`` for arguments of ``types``: from the disk, or else made and kept there."""
    _initialise()
    key = _key(kernel, types)
    stem = f"{kernel.function.__module__}.{kernel.function.__qualname__}".replace(".<locals>", "")
    family = f"{stem}.{_variant(kernel, types)}."
    name = f"{family}{key[:24]}.o"
    for folder in _folders():
        kept = _read(folder / name, key)
        if kept is not None:
            return _bind(*kept)
    text, symbol, returns = make()
    code = _emit(text, symbol)
    for folder in _folders():
        if _write(folder / name, key, symbol, returns, code):
            _drop_older(folder, family, name)
            break
    return _bind(symbol, returns, code)


def _folders() -> Iterator[Path]:
    """Where object files may lie: beside the sources, or in the user's cache."""
    yield Path(__file__).parent / "__pycache__"
    for home in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(home):  # else it would be wherever the command is run
            yield Path(home) / "mlx-dayzero"
            return


def _read(path: Path, key: str) -> tuple[str, str, bytes] | None:
    """Symbol, type of result, and code; None where there is none that is whole."""
    try:
        with path.open("rb") as file:
            if not _ours(os.fstat(file.fileno())):
                return None
            head, _, code = file.read().partition(b"\n")
        facts = json.loads(head)
        symbol, returns = str(facts["symbol"]), str(facts["returns"])
        if (facts["key"], facts["sha256"]) == (key, _digest(symbol, returns, code)):
            return symbol, returns, code
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _ours(found: os.stat_result) -> bool:
    """Whether nobody but this user and the system could have written a file that is to be run."""
    mine = not hasattr(os, "geteuid") or found.st_uid in (0, os.geteuid())
    return mine and not found.st_mode & 0o022


def _digest(symbol: str, returns: str, code: bytes) -> str:
    return hashlib.sha256(f"{symbol}\n{returns}\n".encode() + code).hexdigest()


def _write(path: Path, key: str, symbol: str, returns: str, code: bytes) -> bool:
    facts = {
        "key": key,
        "symbol": symbol,
        "returns": returns,
        "sha256": _digest(symbol, returns, code),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:
        return False
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(json.dumps(facts).encode() + b"\n" + code)
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if not isinstance(error, OSError):
            raise
        return False
    return True


def _drop_older(folder: Path, family: str, name: str) -> None:
    """Remove what the kernel of ``name`` was before its code changed.

    Who still runs the older code makes its file anew; files that are being written have other ends.
    """
    with contextlib.suppress(OSError):
        for other in os.listdir(folder):
            if other.startswith(family) and other.endswith(".o") and other != name:
                (folder / other).unlink()


def _variant(kernel: Compiled, types: Sequence[str]) -> str:
    """What tells the kernels that one function is compiled to apart, whatever its code says."""
    facts = [repr((tuple(types), *_platform())), *_settings(kernel.function)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _settings(function: FunctionType) -> Iterator[str]:
    """The numbers that a function and those that it calls were made with."""
    from quant.compiled import Compiled

    for name, value in sorted(inspect.getclosurevars(function).nonlocals.items()):
        if isinstance(value, Compiled):
            yield from _settings(value.function)
        elif isinstance(value, int | float | np.generic):
            yield f"{name} {value!r}"


def _key(kernel: Compiled, types: Sequence[str]) -> str:
    """Digest of all that decides the machine code."""
    from quant.compiled import OPTIONS

    told = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    facts = (_LAYOUT, sorted(OPTIONS.items()), told, tuple(types), *_platform())
    parts = [repr(part) for part in facts]
    seen: dict[int, int] = {}
    parts += _content(kernel.function, seen)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _platform() -> tuple[str, ...]:
    import llvmlite
    import llvmlite.binding as llvm

    return (
        metadata.version("numba"),
        llvmlite.__version__,
        np.__version__,
        sys.version,
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        _features(),
    )


def _features() -> str:
    """What the processor can do, for LLVM; empty where LLVM cannot tell and goes by its name."""
    import llvmlite.binding as llvm

    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:
        return ""


def _content(function: FunctionType, seen: dict[int, int]) -> Iterator[str]:
    """The code of a function and of all that it calls, with the constants both refer to."""
    from quant.compiled import Compiled

    code = function.__code__
    if id(code) in seen and not code.co_freevars:
        yield f"again {seen[id(code)]}"
        return
    seen[id(code)] = len(seen)
    yield repr((code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars))
    assert not any(isinstance(part, CodeType) for part in code.co_consts), "a nested function"
    named = inspect.getclosurevars(function)
    for name, value in sorted({**named.nonlocals, **named.globals}.items()):
        if isinstance(value, Compiled):
            yield f"{name}: function"
            yield from _content(value.function, seen)
        elif isinstance(value, ModuleType | type | BuiltinFunctionType):
            home = value.__name__ if isinstance(value, ModuleType) else value.__module__
            assert home in _HOMES, f"{name}: import the constant itself from {home}"
            yield f"{name}: {value.__name__}"
        else:
            assert isinstance(value, int | float | np.generic), f"{name} is {value!r}"
            yield f"{name}: {type(value).__name__} {value!r}"


@cache
def _initialise() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine() -> Any:
    import llvmlite.binding as llvm

    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def _emit(text: str, symbol: str) -> bytes:
    """The object file of ``symbol`` and what it needs, nothing else of the module."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    for function in module.functions:
        if not function.is_declaration and function.name != symbol:
            function.linkage = "internal"
    machine = _machine()
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    needed = [function.name for function in module.functions if function.is_declaration]
    foreign = [name for name in needed if name.startswith(_RUNTIME)]
    assert not foreign, f"{symbol} needs {foreign}"
    code: bytes = machine.emit_object(module)
    return code


def _bind(symbol: str, returns: str, code: bytes) -> Bound:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address(symbol)
    assert address, f"{symbol} is not in its object file"
    return Bound(address, returns)
