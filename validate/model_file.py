"""Model code that a checkpoint brings along: who can load it, and whose it may be to run."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import Final

_NEEDED: Final = {"mlx_vlm": {"Model", "ModelConfig"}, "mlx_lm": {"Model", "ModelArgs"}}
"""Classes that each runtime's loader takes from the file."""
_trusted: set[str] = set()


class ModelFileError(ValueError):
    """The file cannot serve as model code; the message says why."""


def trust(path: Path) -> None:
    """Let this very content be executed in this process: its author is who runs the program."""
    _trusted.add(_sha256(path))


def trusted(path: Path) -> bool:
    """Whether the user named a file of this content on the command line."""
    return path.is_file() and _sha256(path) in _trusted


def runtimes_of(path: Path) -> tuple[str, ...]:
    """Runtimes whose loaders take the file, told from the names it defines, without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: cannot be read as Python: {error}") from error
    names = _top_names(tree)
    found = tuple(name for name, needed in _NEEDED.items() if needed <= names)
    if not found:
        raise ModelFileError(
            f"{path}: defines neither Model and ModelConfig (for mlx-vlm) nor Model and ModelArgs "
            "(for mlx-lm)"
        )
    return found


def _top_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                names.add(node.name)
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
