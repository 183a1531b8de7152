"""How failures end: one readable paragraph on stderr and the exit status of their class."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

INTERRUPTED = 130


def run(command: Callable[[], object]) -> int:
    """Run ``command`` and return the exit status; never a traceback unless one is asked for."""
    from click import ClickException
    from click.exceptions import Abort, Exit

    from converter.errors import ConvertError, PlanError

    try:
        status = command()  # outside its standalone mode click gives back what Exit said
        if isinstance(status, int):
            return status
    except Exit as stop:
        return int(stop.exit_code)
    except ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, Abort):
        say("interrupted; run the same command again to go on where it stopped")
        return INTERRUPTED
    except PlanError as error:
        say("\n".join(["The release cannot be converted:", *(f"  {p}" for p in error.problems)]))
        return error.exit_code
    except ConvertError as error:
        say(str(error))
        return error.exit_code
    except BrokenPipeError:
        return 1
    except Exception as error:
        if os.environ.get("CONVERT_DEBUG"):
            traceback.print_exc()
        say(
            f"internal error: {type(error).__name__}: {error}. Nothing unfinished looks finished. "
            "Please report this with the command; CONVERT_DEBUG=1 shows where it happened."
        )
        return 1
    return 0


def say(text: str) -> None:
    """Print a message to stderr, its secrets hidden and no line of it forging another."""
    from converter.errors import one_line
    from converter.hub.errors import redact

    print("\n".join(map(one_line, redact(text).split("\n"))), file=sys.stderr)
