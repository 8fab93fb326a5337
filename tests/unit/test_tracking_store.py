"""Which store is taken, and how a bad one is told."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from toolkit.errors import TrackingError
from toolkit.tracking import check, resolve
from toolkit.tracking.store import Store, without_password
from toolkit.workspace import Workspace


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs")


@pytest.fixture
def server():
    """A server that answers what a test tells it, and keeps the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, dict(self.headers)))
            time.sleep(self.server.delay_s)
            self.send_response(self.server.status)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # the client gave up
                self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.seen, server.status, server.delay_s, server.body = [], 200, 0, b'{"experiments": []}'
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_workspace_has_a_store_of_its_own(workspace):
    store = resolve(None, workspace)
    assert store.uri == f"sqlite:///{workspace.root}/mlflow.db"
    assert store.artifact_root == workspace.root / "mlartifacts"


def test_the_environment_names_a_store_and_the_recipe_overrules_it(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    assert resolve(None, workspace) == Store("http://env:1", None, workspace.root / "tracking")
    assert resolve("http://recipe:2", workspace).uri == "http://recipe:2"


def test_a_relative_database_is_made_absolute_with_its_artifacts_beside_it(
    workspace, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store = resolve("sqlite:///a/b.db", workspace)
    assert store.uri == f"sqlite:///{tmp_path}/a/b.db"
    assert store.artifact_root == tmp_path / "a" / "mlartifacts"


def test_a_described_store_has_no_password_and_finds_it_again(workspace, monkeypatch):
    uri = "postgresql://me:secret@db/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    store = resolve(None, workspace)
    assert "secret" not in json.dumps(store.described())
    assert Store.read(store.described()) == store
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Store.read(store.described()).uri == "postgresql://me@db/mlflow"


def test_passwords_are_taken_out_of_addresses():
    assert without_password("http://me:s@h:1/x") == "http://me@h:1/x"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_database_that_can_be_made_is_fine_and_nothing_is_made(workspace):
    check(resolve(None, workspace))
    assert not workspace.root.exists()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "x.db").write_text("not a database, but long enough to look at" * 20)
    with pytest.raises(TrackingError, match="cannot be opened: file is not a database") as caught:
        check(f"sqlite:///{tmp_path}/x.db")
    assert "move the file away" in caught.value.hint


def test_a_database_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match=r"cannot be made: .*file is not a folder"):
        check(f"sqlite:///{tmp_path}/file/x.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TrackingError, match="no permission to write"):
        check(f"sqlite:///{tmp_path}/x.db")


def test_a_plain_folder_is_refused_with_the_way_out(tmp_path):
    for uri in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(TrackingError, match="no longer writes plain folders") as caught:
            check(uri)
        assert "mlflow migrate-filestore" in caught.value.hint


def test_an_unknown_scheme_is_refused():
    with pytest.raises(TrackingError, match="'redis' is no scheme MLflow knows") as caught:
        check("redis://x")
    assert "postgresql" in caught.value.hint


def test_a_server_that_answers_is_fine(server):
    check(server.url)
    assert server.seen[0][0] == "/api/2.0/mlflow/experiments/search?max_results=1"


def test_the_server_gets_the_users_name_or_token(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok")
    check(server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")
    check(server.url)
    assert [h["Authorization"] for _, h in server.seen] == ["Bearer tok", "Basic bWU6cHc="]


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "set MLFLOW_TRACKING_USERNAME"), (404, "root URL"), (500, "the server's log")],
)
def test_a_server_that_refuses_is_told_with_what_to_do(server, status, said):
    server.status = status
    with pytest.raises(TrackingError, match=f"answers {status}") as caught:
        check(server.url)
    assert said in caught.value.hint


def test_a_page_that_is_not_mlflow_is_told(server):
    server.body = b"<html>hello"
    with pytest.raises(TrackingError, match="not as an MLflow tracking server"):
        check(server.url)


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(TrackingError, match="an address with a password") as caught:
        check("http://me:secret@127.0.0.1:1")
    assert "secret" not in str(caught.value)


def test_nobody_listening_is_told_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(
        TrackingError, match=f"http://127.0.0.1:{port} cannot be reached: .*refused"
    ) as caught:
        check(f"http://127.0.0.1:{port}")
    assert time.monotonic() - begin < 5
    assert "MLFLOW_TRACKING_URI" in caught.value.hint


def test_a_server_that_hangs_is_given_up_after_five_seconds(server, monkeypatch):
    monkeypatch.setattr("toolkit.tracking.store.TIMEOUT_S", 0.5)
    server.delay_s = 20
    begin = time.monotonic()
    with pytest.raises(TrackingError, match="cannot be reached: "):
        check(server.url)
    assert time.monotonic() - begin < 5


def test_a_database_server_that_is_not_there_is_told():
    with pytest.raises(
        TrackingError, match=r"postgresql\+psycopg2://me@127.0.0.1:1/x cannot be reached"
    ):
        check("postgresql+psycopg2://me:pw@127.0.0.1:1/x")


def test_checking_imports_no_mlflow(tmp_path):
    code = """
import sys
from pathlib import Path
from toolkit.tracking import check, resolve
from toolkit.workspace import Workspace
check(resolve(None, Workspace(Path(sys.argv[1]))))
heavy = {"mlflow", "sqlalchemy", "torch"}
sys.exit(any(name.partition(".")[0] in heavy for name in sys.modules))
"""
    root = Path(__file__).parents[2]
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False
        ).returncode
        == 0
    )
