"""The page of commands says what the commands say."""

import click
import command_reference
import pytest


def test_the_page_is_of_these_commands():
    written = command_reference.PAGE.read_text(encoding="utf-8")
    assert written == command_reference.page(), "run python tests/command_reference.py"


@pytest.mark.parametrize(("path", "command"), list(command_reference.commands()), ids=str)
def test_every_command_and_option_is_explained(path, command):
    assert (command.help or "").strip(), path
    unexplained = [
        option.opts[0]
        for option in command.params
        if isinstance(option, click.Option) and not (option.hidden or option.help)
    ]
    assert unexplained == []
