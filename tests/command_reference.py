"""The commands as a page; ``python tests/command_reference.py`` writes docs/command-line.md.

Everything in it comes from the commands themselves, so that it cannot say what they do not.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from converter.batch.run import TERMINATED
from converter.cli import app
from converter.cli.errors import INTERRUPTED

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
INTRODUCTION = f"""\
# Commands

Made from the commands by `python tests/command_reference.py`. `convert` without a subcommand
converts. SRC is a hub id, a folder or a GGUF file; OUT a folder that `convert` made, or for
`validate` and `accept` any MLX checkpoint.

Exit status: 0 done, 2 usage, 3 unsupported or faulty source, 4 gate not met (nothing published),
5 hub or network, {INTERRUPTED} interrupted (Ctrl-C), {TERMINATED} stopped by SIGTERM, 1 anything
else. What was interrupted or stopped goes on where it was when the same command is run again.
`batch run` returns the gravest of its jobs ([nightly.md](nightly.md)).
"""


def commands(
    command: click.Command = app.cli, path: tuple[str, ...] = ("convert",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words, groups before what is in them."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(section(path, one) for path, one in commands())])


def section(path: tuple[str, ...], command: click.Command) -> str:
    """One command: how it is called, what it does, its options."""
    with click.Context(command, info_name=path[-1]) as context:
        words = [*path, *(one.make_metavar(context) for one in arguments(command))]
        options = list(rows(command, context))
    if isinstance(command, click.Group) and not options:
        words.append("COMMAND")
    usage = " ".join([*words, "[OPTIONS]"] if options else words)
    about = "\n\n".join(
        " ".join(part.split()) for part in (command.help or "").strip().split("\n\n")
    )
    lines = [f"## {' '.join(path)}", "", f"`{usage}`", "", about, ""]
    if options:
        lines += ["| option | value | meaning |", "|---|---|---|", *options, ""]
    return "\n".join(lines)


def arguments(command: click.Command) -> list[click.Argument]:
    """The positional arguments."""
    return [one for one in command.params if isinstance(one, click.Argument)]


def rows(command: click.Command, context: click.Context) -> Iterator[str]:
    """One table row for each option that people are meant to see."""
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        value = "" if option.is_flag else f"`{option.make_metavar(context)}`"
        extra = option.get_help_extra(context)
        about = [option.help or ""]
        if "range" in extra:
            about.append(f"Range: {extra['range']}.")
        if "default" in extra:
            about.append(f"Default: {extra['default']}.")
        if option.required:
            about.append("Required.")
        if option.multiple:
            about.append("May be repeated.")
        cells = (names, value, " ".join(filter(None, about)))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
