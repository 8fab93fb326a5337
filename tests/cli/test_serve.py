"""``toolkit serve`` and ``toolkit chat``: what a wrong command is told."""

import pytest
from click.testing import CliRunner

from toolkit.cli import toolkit
from toolkit.errors import UsageError


def command(tmp_path, which, *args):
    return CliRunner().invoke(
        toolkit, [which, *args, "--workspace", str(tmp_path / "runs")], standalone_mode=False
    )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "RECIPE is missing"),
        (("--stop", "m", "--status"), "--stop and --status stand alone"),
        (("--stop",), "no server of"),
        (("--drain", "3"), "--drain goes with --stop"),
    ],
)
def test_a_wrong_command_is_said_to_be_wrong(tmp_path, args, text):
    result = command(tmp_path, "serve", *args)
    assert isinstance(result.exception, UsageError)
    assert text in result.exception.message


def test_json_without_a_message_is_refused(tmp_path):
    result = command(tmp_path, "chat", "--json")
    assert "--json needs --message" in result.exception.message
