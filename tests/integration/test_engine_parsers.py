"""Command lines, held to the parser of the vLLM that is installed; it needs no GPU and no model.

The interpreter is the vLLM environment's, or ``TOOLKIT_TEST_VLLM`` where that is set.
"""

import os
from pathlib import Path

import pytest

from tests import engine_parsers
from toolkit import environments
from toolkit.stages import Interpreter

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def judged() -> dict:
    given = os.environ.get("TOOLKIT_TEST_VLLM")
    if given:
        return engine_parsers.judge(Interpreter(Path(given)), "vllm")
    vllm = environments.resolve("vllm", accelerator="cpu").interpreter()
    return engine_parsers.judge(vllm, "vllm")


def test_vllm_takes_every_golden_command(judged):
    complaints = dict(judged["complaints"])
    assert "no-such-flag" in str(complaints.pop("wrong"))
    assert complaints == {}


def test_the_stored_flags_are_those_of_the_installed_vllm(judged):
    assert engine_parsers.differences(judged["dump"]) == []


def test_vllm_still_prints_what_known_failures_wait_for(judged):
    assert judged["missing"] == []
