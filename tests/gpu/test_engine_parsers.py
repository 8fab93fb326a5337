"""Command lines, held to the parsers of the engines on the GPU host (profile ``gpu-host``); no model is loaded."""

import shutil
from pathlib import Path

import pytest

from tests import engine_parsers
from toolkit import environments
from toolkit.errors import NotInstalledError
from toolkit.launch import profiles

GPU = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="no NVIDIA GPU (no nvidia-smi, no /dev/nvidia0)"),
]


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def judged(request) -> dict:
    environment = environments.resolve(request.param, profile=profiles.load("gpu-host"))
    try:
        return engine_parsers.judge(environment.interpreter(), request.param)
    except NotInstalledError as error:
        pytest.skip(str(error))


def test_the_engine_takes_every_golden_command(judged):
    complaints = dict(judged["complaints"])
    assert "no-such-flag" in str(complaints.pop("wrong"))
    assert complaints == {}


def test_the_stored_flags_are_those_of_the_installed_engine(judged):
    assert engine_parsers.differences(judged["dump"]) == []


def test_the_engine_still_prints_what_known_failures_wait_for(judged):
    assert judged["missing"] == []
