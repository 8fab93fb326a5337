"""What a server meets when its own processes answer badly, late or not at all."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.fleet import server_spec
from toolkit.engines.client import Client
from toolkit.errors import EngineError, ProofError
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.table import Table
from toolkit.recipe.serve import ServeSection
from toolkit.serving import gpus
from toolkit.serving.control import ControlServer, forget_sockets, request, socket_folder
from toolkit.serving.crew import Crew
from toolkit.serving.front import Front
from toolkit.serving.gpus import Gpu
from toolkit.serving.joined import Joined
from toolkit.serving.parts import Health, StopRequestedError
from toolkit.serving.replicas import Pulse, Replica
from toolkit.serving.router import Router
from toolkit.serving.standing import Standing
from toolkit.serving.state import Endpoint, InterpreterSpec, PartState

CUT_OFF = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\nvllm:prompt"
NO_JSON = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops"


class Owner:
    """A supervisor that keeps nothing."""

    def __init__(self) -> None:
        self.health = Health(shallow_s=0.0, quiet_s=1e9)

    def changed(self) -> None: ...
    def failed(self, error) -> None: ...
    def event(self, event, **values) -> None: ...


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A process that dies in the middle of each answer, or says nonsense; its URL."""
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        over.set()
        thread.join()


def router(url: str, tmp_path: Path) -> Router:
    made = Router(
        Owner(), InterpreterSpec("/p").interpreter(), (int(url[-5:]), 1), tmp_path / "router.log"
    )
    made.url = url
    return made


def test_an_engine_that_dies_within_an_answer_is_only_not_alive(tmp_path):
    with answering(CUT_OFF) as url:
        pulse = Pulse(url, "m", Health(shallow_s=0.0, deep_s=5.0))
        with pytest.raises(EngineError, match="the engine hangs"):
            pulse.check(1)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(CUT_OFF, "does not answer"), (NO_JSON, "list of workers is none: b'oops'")],
)
def test_a_router_that_dies_within_an_answer_is_told_of_as_such(tmp_path, answer, said):
    with answering(answer) as url, pytest.raises(EngineError, match=said) as error:
        router(url, tmp_path).ask()
    assert error.value.hint == f"its log is {tmp_path / 'router.log'}"


def test_an_engine_that_says_nonsense_is_an_error_of_the_engine():
    with answering(NO_JSON) as url, pytest.raises(EngineError, match="not JSON: b'oops'"):
        Client(url).models()
    listing = NO_JSON.replace(b"oops", b"[42]")
    with answering(listing) as url, pytest.raises(EngineError, match="lists no models"):
        Client(url).models()


@pytest.fixture
def front(tmp_path) -> Iterator[Front]:
    sockets = socket_folder()
    settings = GatewaySettings(name="demo", control=sockets / "front")
    yield Front(Owner(), settings, tmp_path, table("first"))
    forget_sockets(sockets / "front")


def table(reason: str) -> Table:
    return Table(None, (), 64, ready=False, reason=reason)


def test_a_table_that_the_front_missed_is_sent_again(front):
    came, busy = [], True

    def handle(method, path, body):
        if busy:
            raise EngineError("busy")
        came.append((method, path, body.get("reason")))
        return 200, {}

    with pytest.raises(EngineError):
        front.push(lambda: table("second"))
    server = ControlServer(front.settings.control, handle)
    with pytest.raises(EngineError, match="busy"):
        front.ask()
    busy = False
    front.ask()
    front.ask()
    server.close()
    assert came == [("PUT", "/table", "second"), ("GET", "/status", None)]


def test_a_front_too_busy_to_count_is_not_idle(front):
    front.become("ready")
    assert not front.is_idle
    front.become("stopped")
    assert front.is_idle


def test_a_part_that_does_not_end_does_not_hold_the_supervisor():
    program = (
        "import threading\n"
        "from toolkit.serving.parts import Health, Part\n"
        "class Owner:\n"
        "    health = Health()\n"
        "    def changed(self): pass\n"
        "class Stuck(Part):\n"
        "    def live(self): threading.Event().wait()\n"
        "part = Stuck('stuck', Owner())\n"
        "part.start()\n"
        "part.stop()\n"
        "print(part.join(0.1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_a_replica_that_is_to_stop_is_not_proven_to_the_end(tmp_path):
    replica = Replica(Owner(), server_spec(tmp_path, tmp_path), 0, 1)
    replica.proving("parity of tickets")
    assert replica.state.detail == "parity of tickets"
    replica.stop()
    with pytest.raises(StopRequestedError):
        replica.proving("agreement of tickets")


def test_a_gpu_that_fell_off_the_bus_is_named(tmp_path):
    one, two = Gpu("0", "GPU-a", 80_000, 79_000), Gpu("1", "GPU-b", 80_000, 79_000)
    replica = Replica(
        Owner(), server_spec(tmp_path, tmp_path), 0, 1, devices=(one, two), look=lambda: [one]
    )
    with pytest.raises(EngineError, match="does not see GPU 1 any more") as error:
        replica._fraction()
    assert "nvidia-smi" in error.value.hint


def test_a_gpu_without_a_memory_of_its_own_is_said_to_be_so():
    with pytest.raises(EngineError, match="does not say how much memory") as error:
        gpus.read("0, GPU-aa, [N/A], [N/A], [N/A]\n")
    assert "nvidia-smi" in error.value.hint


def test_a_fault_of_ours_is_answered_on_the_control_socket():
    def handle(method, path, body):
        raise KeyError("lora")

    sockets = socket_folder()
    server = ControlServer(sockets / "s", handle)
    with pytest.raises(EngineError, match=r"GET /status failed: KeyError\('lora'\)") as error:
        request(sockets / "s", "GET", "/status")
    assert error.value.hint == "this is a fault of toolkit"
    with pytest.raises(EngineError, match="the body is not a JSON object"):
        request(sockets / "s", "POST", "/stop", "[]")
    with pytest.raises(EngineError, match="the body is not JSON"):
        request(sockets / "s", "POST", "/stop", "{")
    server.close()
    forget_sockets(sockets / "s")


class NoAdapters:
    def routes(self):
        return ()

    def desired(self):
        return ()


class NoProofs:
    def certificate(self, desired, phases):
        return {}

    def refuses(self):
        return {}


class Crewed(Crew):
    """A crew whose states a test says."""

    said: tuple[PartState, ...] = ()

    def states(self):
        return self.said


@pytest.fixture
def standing(tmp_path) -> Standing:
    crew = Crewed(server_spec(tmp_path, tmp_path))
    return Standing(crew.spec, crew, NoAdapters(), NoProofs(), lambda _: "demo-base")


def test_asking_for_the_status_tells_the_front_nothing(standing):
    standing.table()
    standing._crew.said = (PartState("replica-0", "starting", detail="loading weights"),)
    assert standing.news
    assert standing.status().reason == "starting: replica-0 starting: loading weights"
    assert standing.news
    standing.table()
    assert not standing.news


def test_a_server_stands_by_what_joined_it(standing):
    first, second = Endpoint(0, "http://a", 1), Endpoint(0, "http://a", 2)
    assert standing.status().models == ()
    standing.join(second)
    standing.ready = True
    assert not standing.leave(first)  # of an earlier life
    status = standing.status()
    assert (status.ready, status.models, standing.table().upstream) == (
        True,
        ("demo-base",),
        "http://a",
    )
    standing.fail(EngineError("GPU lost"))
    standing.fail(EngineError("and then this"))
    assert standing.status().reason == "GPU lost"
    standing.ending = True
    assert standing.table().reason == "draining"
    assert standing.leave(second)
    assert standing.endpoints() == ()


def test_an_engine_of_elsewhere_that_never_answers_ends_the_start(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    made = server_spec(tmp_path, tmp_path, engines=["http://127.0.0.1:9"], start_timeout_s=1)
    part = Joined(Owner(), made, 1, "http://127.0.0.1:9")
    with pytest.raises(
        EngineError, match=r"names http://127.0.0.1:9, which did not answer in 1 s"
    ) as e:
        part.live()
    assert "take it out of serve.engines" in e.value.hint
    assert part.state.state == "starting"


def test_an_engine_of_elsewhere_that_is_refused_when_it_comes_back_gets_no_traffic(tmp_path):
    """Somebody replaced its model meanwhile; the server goes on without it, and looks again."""
    (tmp_path / "config.json").write_text("{}")
    told, gone = [], []

    class Proves(Owner):
        def event(self, event, **values):
            told.append(values.get("text", ""))

        def admit(self, replica, endpoint, loaded):
            assert loaded == ()
            if part.ready_once.is_set() and endpoint.generation > 2:
                part.stop()
            if endpoint.generation > 1:
                raise ProofError("token 3 differs", "export it again")

        def dismiss(self, endpoint):
            gone.append(endpoint.generation)

    with answering(CUT_OFF) as url:
        made = server_spec(tmp_path, tmp_path, engines=[url])
        part = Joined(Proves(), made, 1, url, again_s=0.01)
        part._await_health = lambda deadline: None
        with pytest.raises(StopRequestedError):
            part.live()
    assert gone == [1, 2, 3]
    assert f"{url} left: token 3 differs" in told
    assert part.state.state == "waiting"


@pytest.mark.parametrize("url", ["10.0.0.2:8000", "ftp://a", "http://", "http://a:1/v1"])
def test_what_is_no_address_of_an_engine(url):
    with pytest.raises(ValidationError, match=r"write http://10.0.0.2:8000"):
        ServeSection(engines=(url,))


def test_a_router_is_not_ready_before_it_knows_who_joined_while_it_started(tmp_path, monkeypatch):
    """Otherwise the death of the one worker that it was started with is a 503, though the other is ready."""
    made, told = router("http://127.0.0.1:12345", tmp_path), []
    made.add("http://first")

    def watch(_process):
        told.append(made.state.state)
        raise StopRequestedError

    monkeypatch.setattr("toolkit.serving.router.server.stop", lambda *_, **__: None)
    monkeypatch.setattr(made, "_spawn", lambda workers: subprocess.Popen(["true"]))
    monkeypatch.setattr(
        made, "_await_health", lambda process: (process.wait(), made.add("http://second"))
    )
    monkeypatch.setattr(made, "_list", lambda: ["http://first"])
    monkeypatch.setattr(made, "_tell", lambda *said: told.append((made.state.state, *said)))
    monkeypatch.setattr(made, "watch", watch)
    with pytest.raises(StopRequestedError):
        made.live()
    assert told == [("starting", "add_worker", "http://second"), "ready"]
