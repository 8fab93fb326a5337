"""What Ray says of a job, in our words; and what is said when it says nothing."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from toolkit.errors import BackendError, UnknownStateError
from toolkit.launch.ray.backend import Ray
from toolkit.launch.ray.client import _token_of
from toolkit.launch.ray.seen import ERRORS, GAVE_UP, seen
from toolkit.launch.states import Cause, State

COMMAND = "JOB_ENTRYPOINT_COMMAND_ERROR"


def job(status, **more):
    return {"status": status, "driver_agent_http_address": "http://10.0.0.7:52365", **more}


@pytest.mark.parametrize(
    ("status", "state", "cause"),
    [
        ("PENDING", State.queued, None),
        ("RUNNING", State.running, None),
        ("SUCCEEDED", State.succeeded, Cause.done),
        ("STOPPED", State.cancelled, Cause.cancelled),
    ],
)
def test_a_status_has_its_state(status, state, cause):
    found = seen(job(status, message="why"))
    assert (found.state, found.cause, found.word, found.host) == (state, cause, status, "10.0.0.7")
    assert found.reason == (None if status == "SUCCEEDED" else "why")


@pytest.mark.parametrize(
    ("code", "state", "cause"),
    [
        (1, State.failed, Cause.failed),
        (2, State.failed, Cause.usage),
        (3, State.failed, Cause.not_installed),
        (75, State.preempted, Cause.preempted),
        (-9, State.preempted, Cause.lost),
        (137, State.preempted, Cause.lost),
    ],
)
def test_exit_codes_tell_the_cause(code, state, cause):
    message = f"failed with exit code {code}, last available logs:\nfirst\nlast words\n"
    found = seen(job("FAILED", error_type=COMMAND, driver_exit_code=code, message=message))
    assert (found.state, found.cause, found.exit_code) == (state, cause, code)
    assert found.reason == "last words"


def test_the_command_itself_is_not_what_a_job_said():
    """Ray buffers that line, and a quick command writes before it: seen on Ray 2.60, on a busy machine."""
    entrypoint = "python -c 'print(1)\nraise SystemExit(75)'"
    tail = f"Job entrypoint command failed:\nkept\nRunning entrypoint for job a: {entrypoint}\n"
    found = seen(
        job("FAILED", error_type=COMMAND, driver_exit_code=75, message=tail)
        | {"entrypoint": entrypoint}
    )
    assert found.reason == "kept"


@pytest.mark.parametrize("word", [word for word in ERRORS if word not in (GAVE_UP, COMMAND)])
def test_errors_of_ray_tell_the_cause(word):
    found = seen(job("FAILED", error_type=word))
    assert (found.word, found.cause) == (word, ERRORS[word])
    assert found.state is (State.preempted if ERRORS[word].retried else State.failed)


def test_a_job_that_ray_gave_up_on_for_want_of_room_is_handed_over_again():
    found = seen(job("FAILED", error_type=GAVE_UP, message="failed to start within 900 s"))
    assert (found.state, found.cause) == (State.retrying, None)


def test_an_old_ray_without_error_types_is_understood():
    assert seen(job("FAILED", driver_exit_code=2)).cause is Cause.usage
    assert seen(job("FAILED")).cause is Cause.failed


@pytest.mark.parametrize("strange", [job("LIMBO"), job("FAILED", error_type="LIMBO")])
def test_a_word_that_no_table_has_is_an_error(strange):
    with pytest.raises(UnknownStateError, match="Ray says that a job is 'LIMBO'"):
        seen(strange)


def test_nothing_is_asked_about_no_jobs():
    ray = Ray({"address": "http://127.0.0.1:1"}, Path())
    assert ray.seen([]) == {}
    ray.cancel([])


def test_a_cluster_that_is_away_is_said_with_its_address():
    with pytest.raises(BackendError, match=r"Ray at http://127.0.0.1:1 does not answer") as no:
        Ray({"address": "http://127.0.0.1:1"}, Path()).seen(["a"])
    assert "ssh -L 8265" in no.value.hint


@pytest.fixture
def head(monkeypatch):
    """A server that answers everything with one status and body, and keeps what it was shown."""
    shown = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            shown.append(self.headers.get("Authorization"))
            self.send_response(server.status)
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.body, server.shown = 200, b"[]", shown
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_refusal_is_the_last_line_of_rays_traceback(head):
    head.status, head.body = 500, b"Traceback (most recent call last):\nValueError: bad id\n"
    with pytest.raises(BackendError, match=r"^Ray refuses \(500\): ValueError: bad id$"):
        Ray({"address": head.url}, Path()).seen(["a"])


def test_a_cluster_that_wants_its_token_is_said(head):
    head.status, head.body = 401, b"Unauthorized"
    with pytest.raises(BackendError, match=r"refuses \(401\)") as no:
        Ray({"address": head.url}, Path()).seen(["a"])
    assert "ray.token in the profile" in no.value.hint


def test_what_is_not_ray_is_said(head):
    head.body = b"<html>"
    with pytest.raises(BackendError, match="does not answer as Ray's Jobs API does"):
        Ray({"address": head.url}, Path()).seen(["a"])


def test_the_token_is_the_profiles_or_where_ray_looks_for_it(head, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("of the profile\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    Ray({"address": head.url, "token": f"file:{file}"}, Path()).seen(["a"])
    Ray({"address": head.url}, Path()).seen(["a"])
    assert head.shown == ["Bearer of the profile", "Bearer of the environment"]


def test_ray_looks_for_its_token_in_three_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _token_of({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("home\n")
    (tmp_path / "other").write_text("path\n")
    assert _token_of({}) == "home"
    assert _token_of({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}) == "path"
    assert _token_of({"RAY_AUTH_TOKEN_PATH": "/x", "RAY_AUTH_TOKEN": "variable"}) == "variable"


def test_jobs_that_were_not_submitted_through_the_api_are_left_out(head):
    head.body = json.dumps(
        [{"submission_id": None, "job_id": "01"}, job("RUNNING", submission_id="a")]
    ).encode()
    assert set(Ray({"address": head.url}, Path()).seen(["a", "b"])) == {"a"}


def test_a_certificate_authority_of_ones_own_is_used(tmp_path):
    options = {"address": "https://127.0.0.1:1", "ca": str(tmp_path / "none.pem")}
    with pytest.raises(BackendError, match=r"none\.pem"):
        Ray(options, Path()).seen(["a"])
