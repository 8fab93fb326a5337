"""The loop closes: train -> register -> alias -> serve. The store is a real MLflow on SQLite, engines are processes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.adapter_folders import write_adapter, write_base
from tests.fleet import TestFleet, server_spec
from toolkit import artifact, digests
from toolkit.cli import toolkit
from toolkit.errors import ArtifactError, TrackingError
from toolkit.serving.adapters import AdapterSet
from toolkit.serving.registry import ModelRegistry
from toolkit.serving.sources import bring
from toolkit.serving.state import AdapterSpec
from toolkit.serving.watch import Watcher
from toolkit.tracking import Store, resolve
from toolkit.tracking.client import connect, experiment_id
from toolkit.workspace import Workspace

pytestmark = pytest.mark.integration

SOURCE = "models:/tickets@champion"
TAG = "toolkit.serving.demo"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: making them takes most of the time here."""
    space = Workspace(tmp_path_factory.mktemp("store"))
    connect(resolve(space.mlflow_uri, space)).search_registered_models()
    return space.root / "mlflow.db"


class World:
    """A workspace with exported adapters, a registry, and a server of the first version."""

    def __init__(self, folder: Path, empty: Path) -> None:
        self.space = Workspace(folder / "runs")
        self.space.root.mkdir()
        shutil.copy(empty, self.space.root / "mlflow.db")
        self.store: Store = resolve(self.space.mlflow_uri, self.space)
        self.registry = ModelRegistry(self.store, self.space)
        self.client: Any = connect(self.store)
        self.model = write_base(folder / "model")
        self.folder = folder

    def exported(self, seed: int, **config: Any) -> Path:
        """As the step export-adapter leaves it, with its MLflow run."""
        experiment = experiment_id(self.client, self.store, "tickets")
        run = self.client.create_run(experiment, run_name="export-adapter").info.run_id
        place = self.exported_at(seed)
        part = artifact.part_of(place)
        part.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(part, seed=seed, **config)
        facts = {"rank": 4, "base_fingerprint": "b" * 64}
        manifest = {
            "kind": "adapter",
            "recipe": "tickets",
            "fingerprint": f"{seed:064x}"[::-1],
            "facts": facts,
            "metrics": {},
            "mlflow": {"run_id": run, "store": self.store.shown},
        }
        return artifact.publish(place, manifest).path

    def exported_at(self, seed: int) -> Path:
        return self.space.artifact("export", f"{seed:064x}"[::-1])

    def register(self, seed: int, alias: str | None = "champion", **config: Any) -> str:
        return self.registry.register(self.exported(seed, **config), "tickets", alias).version

    def move(self, version: str) -> None:
        self.client.set_registered_model_alias("tickets", "champion", version)

    def tag(self, version: str) -> str | None:
        return self.client.get_model_version("tickets", version).tags.get(TAG)

    def spec(self) -> AdapterSpec:
        return bring("tickets", SOURCE, self.folder, self.registry)


@pytest.fixture
def world(tmp_path: Path, empty: Path) -> World:
    return World(tmp_path, empty)


@pytest.fixture
def fleet(world: World) -> Iterator[TestFleet]:
    """A server of version 1 that is to follow the alias."""
    world.register(1)
    first = world.spec()
    spec = server_spec(world.folder, world.model, [first], watch_s=1)
    fleet = TestFleet(spec)
    fleet.start_engine([first])
    yield fleet
    fleet.close()


def watcher(world: World, fleet: TestFleet, served: AdapterSet) -> Watcher:
    made = Watcher(served, world.registry, "demo", 0.2, fleet.event)
    made.start()
    made.close()  # the test looks by itself
    made._closing.clear()
    return made


def routed(fleet: TestFleet) -> str:
    """The registered version that requests go to."""
    target = fleet.routes[0].targets[0]
    assert fleet.ask("tickets", 0, 1)[0] == target.model_id
    return str(target.source)


def test_a_registered_version_carries_run_fingerprint_and_digest(world: World) -> None:
    folder = world.exported(1)
    found = world.registry.register(folder, "tickets", "champion")
    version = world.client.get_model_version("tickets", found.version)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert version.run_id == version.tags["toolkit.run_id"] == manifest["mlflow"]["run_id"]
    assert version.tags["toolkit.fingerprint"] == manifest["fingerprint"]
    assert version.tags["toolkit.digest"] == digests.of_path(folder)
    assert (version.tags["toolkit.rank"], version.tags["toolkit.recipe"]) == ("4", "tickets")
    assert list(version.aliases) == ["champion"]
    again = world.registry.register(folder, "tickets", "challenger")
    assert again.version == found.version  # not uploaded twice

    spec = world.spec()
    assert (spec.registered, spec.source) == ("models:/tickets/1", SOURCE)
    assert spec.run_id == manifest["mlflow"]["run_id"]
    assert digests.of_path(spec.place) == digests.of_path(folder)


def test_what_was_damaged_in_the_store_is_refused(world: World) -> None:
    world.register(1)
    stored = next((world.space.root / "mlartifacts").rglob("adapter_model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ArtifactError, match=r"models:/tickets/1 is damaged: adapter_model\.safetensors has sha256"
    ):
        world.spec()


def test_a_copy_that_was_damaged_here_is_brought_again(world: World) -> None:
    world.register(1)
    first = world.spec()
    (first.place / "adapter_model.safetensors").write_bytes(b"")
    assert world.spec() == first
    assert digests.of_path(first.place)[:16] == first.version


def test_an_unknown_alias_is_named(world: World) -> None:
    world.register(1)
    with pytest.raises(TrackingError, match=r"models:/tickets@champio: .*alias champio not found"):
        bring("tickets", "models:/tickets@champio", world.folder, world.registry)


def test_a_server_starts_while_the_store_is_away(world: World) -> None:
    world.register(1)
    first = world.spec()
    away = Store("http://127.0.0.1:9", None, world.store.outboxes)
    assert bring("tickets", SOURCE, world.folder, ModelRegistry(away, world.space)) == first
    with pytest.raises(TrackingError, match="cannot be reached"):
        ModelRegistry(away, world.space).resolve(SOURCE, remembered=False)
    with pytest.raises(TrackingError, match="was never here"):
        ModelRegistry(away, world.space).resolve("models:/tickets@other")


def test_an_alias_that_moves_is_followed_and_moving_it_back_rolls_back(
    world: World, fleet: TestFleet
) -> None:
    served = fleet.serve()
    watch = watcher(world, fleet, served)
    watch.look()
    assert str(world.tag("1")).startswith("serving since 20")
    world.register(2)
    watch.look()
    assert routed(fleet) == "models:/tickets/2"
    assert str(world.tag("2")).startswith("serving since 20")
    assert "agreement with the training side NOT CHECKED" in str(world.tag("2"))
    assert str(world.tag("1")).startswith("served until 20")
    assert fleet.told[-1][0] == "swap"
    world.move("1")
    watch.look()
    assert routed(fleet) == "models:/tickets/1"
    assert str(world.tag("1")).startswith("serving since 20")
    assert str(world.tag("2")).startswith("served until 20")
    assert len(fleet.loaded()[0]) == 1


def test_a_bad_version_is_refused_once_and_the_registry_says_why(
    world: World, fleet: TestFleet
) -> None:
    served = fleet.serve()
    watch = watcher(world, fleet, served)
    bad = world.register(3)
    fleet.refuses = {digests.of_path(world.exported_at(3))[:16]}
    watch.look()
    watch.look()
    assert routed(fleet) == "models:/tickets/1"
    assert str(world.tag(bad)).startswith("refused: tickets@")
    assert str(world.tag(bad)).endswith("answers as the base does")
    assert [kind for kind, _ in fleet.told].count("refused") == 1
    dora = world.register(4, use_dora=True)
    watch.look()
    assert "uses DoRA" in str(world.tag(dora))
    assert routed(fleet) == "models:/tickets/1"
    good = world.register(5)
    watch.look()
    assert routed(fleet) == f"models:/tickets/{good}"


def test_a_store_that_is_away_changes_nothing(world: World, fleet: TestFleet) -> None:
    served = fleet.serve()
    watch = watcher(world, fleet, served)
    world.register(2)
    database, elsewhere = world.space.root / "mlflow.db", world.space.root / "away.db"
    database.rename(elsewhere)
    database.mkdir()  # what is there now cannot be opened
    watch.look()
    watch.look()
    assert routed(fleet) == "models:/tickets/1"
    notes = [v["text"] for kind, v in fleet.told if kind == "note"]
    assert len([text for text in notes if "aliases are not followed for now" in text]) == 1
    database.rmdir()
    elsewhere.rename(database)
    watch.look()
    assert routed(fleet) == "models:/tickets/2"


def test_a_server_that_follows_starts_with_what_it_had(world: World, fleet: TestFleet) -> None:
    served = fleet.serve()
    world.register(6)  # moved while the server was down; the recipe resolves to it
    spec = server_spec(world.folder, world.model, [world.spec()], watch_s=1)
    assert [s.registered for s in AdapterSet(TestFleet(spec)).desired()] == ["models:/tickets/1"]
    unwatched = server_spec(world.folder, world.model, [world.spec()])
    assert [s.registered for s in AdapterSet(TestFleet(unwatched)).desired()] == [
        "models:/tickets/2"
    ]
    assert served.desired()[0].registered == "models:/tickets/1"


def test_the_thread_looks_by_itself_and_ends(world: World, fleet: TestFleet) -> None:
    served = fleet.serve()
    watch = Watcher(served, world.registry, "demo", 0.2, fleet.event)
    watch.start()
    world.register(2)
    deadline = time.monotonic() + 60
    while routed(fleet) != "models:/tickets/2":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    watch.close()
    assert not watch._thread.is_alive()


def test_the_command_registers(world: World) -> None:
    folder = world.exported(1)
    arguments = ["adapters", "register", str(folder), "--name", "tickets", "--alias", "champion"]
    done = CliRunner().invoke(toolkit, [*arguments, "--workspace", str(world.space.root)])
    assert done.exit_code == 0, done.output
    assert done.stdout == "models:/tickets/1\n"
    assert world.client.get_model_version_by_alias("tickets", "champion").version == 1
