"""Secrets that are variables, on this machine: the keeper starts jobs, with what it was started with."""

import os
import signal

import pytest

from tests.contract.test_contract import _wait_for
from toolkit.errors import UsageError
from toolkit.launch import keeper_process, secrets

pytestmark = pytest.mark.integration
WANTED = {"TOKEN": "env:MY_TOKEN", "OTHER": "file:/etc/hostname"}


def test_a_variable_that_is_not_set_is_refused_before_anything_is_submitted(local, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UsageError, match="want MY_TOKEN, which is not set here") as no:
        secrets.check(WANTED, local.jobs)
    assert no.value.hint.startswith("export MY_TOKEN=")


def test_a_keeper_that_lacks_the_variable_or_has_another_value_is_told_and_can_be_replaced(
    local, monkeypatch
):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    keeper_process.ensure(local.jobs)
    _wait_for(local.keepers, "keeper")
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    with pytest.raises(UsageError) as no:
        secrets.check(WANTED, local.jobs)
    [pid] = local.keepers()
    assert no.value.message.startswith(
        f"what starts jobs in this workspace (process {pid}) has no MY_TOKEN"
    )
    assert f"`kill {pid}`" in no.value.hint
    assert "s3cret" not in no.value.message + no.value.hint

    os.kill(pid, signal.SIGTERM)  # as the hint says
    _wait_for(lambda: not local.keepers(), "end of the keeper")
    secrets.check(WANTED, local.jobs)
    code = "import os; open('seen', 'w').write(os.environ['TOKEN'])"
    chain = local.submit(("python3", "-c", code), secrets=WANTED)
    _wait_for(local.keepers, "new keeper")
    secrets.check(WANTED, local.jobs)
    assert local.ended(chain).state == "succeeded"
    monkeypatch.setenv("MY_TOKEN", "rotated")
    with pytest.raises(UsageError, match="another value of MY_TOKEN"):
        secrets.check(WANTED, local.jobs)
    monkeypatch.delenv("MY_TOKEN")
    secrets.check({"OTHER": "file:/etc/hostname"}, local.jobs)  # files ask nobody
