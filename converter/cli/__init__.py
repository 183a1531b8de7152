"""The command line: ``convert`` and its subcommands."""

from converter.cli.app import main

__all__ = ["main"]
