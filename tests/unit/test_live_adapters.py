"""Adapters of a running server change on all replicas or on none, and no request is lost. The engines are processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapter_folders import write_adapter, write_base
from tests.fleet import TestFleet, server_spec
from toolkit.errors import ArtifactError, EngineError, PreflightError, ProofError, UsageError
from toolkit.serving import adapters as adapters_module
from toolkit.serving.adapters import AdapterSet
from toolkit.serving.desired import read_spec
from toolkit.serving.registry import Registered
from toolkit.serving.state import AdapterSpec
from toolkit.serving.watch import Watcher

STREAMS = 32


class World:
    """Two versions of ``tickets`` and a fleet of replicas that serve the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_base(folder / "model")
        self.old = self.adapter("tickets", seed=1)
        self.new = self.adapter("tickets", seed=2)

    def adapter(self, name: str, *, seed: int, **config: object) -> AdapterSpec:
        return read_spec(name, write_adapter(self.folder / f"{name}-{seed}", seed=seed, **config))

    def fleet(self, replicas: int = 1, **serve: object) -> TestFleet:
        fleet = TestFleet(server_spec(self.folder, self.model, [self.old], **serve))
        for _ in range(replicas):
            fleet.start_engine([self.old])
        return fleet


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def two(world: World) -> Iterator[TestFleet]:
    fleet = world.fleet(2)
    yield fleet
    fleet.close()


@pytest.fixture
def one(world: World) -> Iterator[TestFleet]:
    fleet = world.fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def idle(world: World) -> TestFleet:
    """Without engines: for what is refused before one is asked."""
    return world.fleet(0)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names(served: AdapterSet) -> list[str]:
    return [spec.lora_name for spec in served.desired()]


def remembered(fleet: TestFleet) -> list[str]:
    values = json.loads((fleet.spec.place / "adapters.json").read_text())
    return [f"{a['name']}@{a['version']}" for a in values["adapters"]]


def test_a_swap_under_32_streams_loses_nothing(world: World, two: TestFleet) -> None:
    served = two.serve()
    for endpoint in two.running:
        two.fake(endpoint, delay_s=0.02)
    stop, proven_at = threading.Event(), []
    two.before_proof = lambda *_: time.sleep(0.2)

    def client(number: int) -> list[tuple[float, str, str]]:
        seen = []
        while not stop.is_set():
            began = time.monotonic()
            seen.append((began, *two.ask("tickets", number, 20)))
        return seen

    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(client, number) for number in range(STREAMS)]
        try:
            time.sleep(0.5)
            change = served.swap(world.new)
            proven_at.append(time.monotonic())
            assert two.loaded() == [{world.new.lora_name}, {world.new.lora_name}]
            time.sleep(0.3)
        finally:
            stop.set()
        seen = [one for done in clients for one in done.result()]

    for _, model, text in seen:  # whole, and from one version alone
        assert text.startswith(f"{model}: ")
        assert text.endswith(" t19")
    by_version = {model: [s for s in seen if s[1] == model] for model in {s[1] for s in seen}}
    assert by_version.keys() == {world.old.lora_name, world.new.lora_name}
    assert len(by_version[world.old.lora_name]) >= STREAMS
    assert all(began < proven_at[0] for began, model, _ in seen if model == world.old.lora_name)
    assert sorted(two.proven[-2:]) == [(0, world.new.lora_name), (1, world.new.lora_name)]
    assert change.unloaded == (world.old.lora_name,)
    assert change.cut == 0
    assert remembered(two) == [world.new.lora_name]


def test_no_request_takes_a_new_version_before_its_proof(world: World, one: TestFleet) -> None:
    served = one.serve()
    routed = []
    one.before_proof = lambda *_: routed.append(one.ask("tickets", 0, 1)[0])
    served.swap(world.new)
    assert routed == [world.old.lora_name]
    assert one.ask("tickets", 0, 1)[0] == world.new.lora_name


def test_old_streams_finish_on_the_old_version_before_it_goes(world: World, one: TestFleet) -> None:
    served = one.serve()
    one.fake(one.running[0], delay_s=0.1)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(one.ask, "tickets", 0, 25)
        wait_until(lambda: one.open[world.old.lora_name] > 0)
        swap = pool.submit(served.swap, world.new)
        wait_until(lambda: one.routes[0].targets[0].model_id == world.new.lora_name)
        time.sleep(0.4)  # time enough to unload it too early
        assert not slow.done()
        assert one.loaded() == [{world.old.lora_name, world.new.lora_name}]
        assert [row["label"] for row in served.rows()] == ["stable", "retiring"]
        assert slow.result()[1].endswith(" t24")
        assert swap.result().unloaded == (world.old.lora_name,)
    assert one.loaded() == [{world.new.lora_name}]


def test_rolling_back_does_not_wait_for_old_streams(world: World, one: TestFleet) -> None:
    served = one.serve()
    one.open[world.old.lora_name] = 1  # a stream that takes its time
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(served.swap, world.new)
        wait_until(lambda: one.routes[0].targets[0].model_id == world.new.lora_name)
        back = served.swap(world.old)
        assert swap.result().unloaded == ()
    assert back.unloaded == (world.new.lora_name,)
    assert one.loaded() == [{world.old.lora_name}]
    assert names(served) == remembered(one) == [world.old.lora_name]


def test_streams_that_never_end_are_given_up_after_a_deadline(
    world: World, one: TestFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = one.serve()
    monkeypatch.setattr(adapters_module, "DRAIN_S", 0.2)
    one.open[world.old.lora_name] = 3
    change = served.swap(world.new)
    assert (change.cut, change.unloaded) == (3, (world.old.lora_name,))
    assert one.loaded() == [{world.new.lora_name}]


def test_a_refused_proof_changes_nothing(world: World, two: TestFleet) -> None:
    served = two.serve()
    two.refuses = {world.new.version}
    routes = two.routes
    with pytest.raises(ProofError, match="answers as the base does"):
        served.swap(world.new)
    assert two.loaded() == [{world.old.lora_name}] * 2
    assert (two.routes, names(served), remembered(two)) == (
        routes,
        [world.old.lora_name],
        [world.old.lora_name],
    )


def test_a_failure_on_one_replica_takes_it_back_on_the_other(world: World, two: TestFleet) -> None:
    served = two.serve()

    def only_the_second(endpoint: object, _: object) -> None:
        if endpoint == two.running[1]:
            raise EngineError("replica 1 is out of memory")

    two.before_proof = only_the_second
    with pytest.raises(EngineError, match="replica 1 is out of memory"):
        served.swap(world.new)
    assert two.loaded() == [{world.old.lora_name}] * 2
    assert names(served) == [world.old.lora_name]


def test_a_replica_killed_during_a_swap_takes_it_back(world: World, two: TestFleet) -> None:
    served = two.serve()

    def die(endpoint: object, _: object) -> None:
        if endpoint == two.running[1]:
            two.processes[1].kill()
            two.processes[1].wait()

    two.before_proof = die
    with pytest.raises(EngineError):
        served.swap(world.new)
    assert two.loaded() == [{world.old.lora_name}]
    assert names(served) == remembered(two) == [world.old.lora_name]


def test_an_engine_that_comes_back_gets_what_is_desired_now(world: World, two: TestFleet) -> None:
    served = two.serve()
    late = two.running.pop()  # it is starting with what was desired before the swap
    two.processes[1], process = two.processes[0], two.processes[1]
    del two.processes[1]
    served.swap(world.new)
    two.running.append(late)
    two.processes.append(process)
    with two.changing():
        shown = served.catch_up(late, [world.old])
    assert list(shown) == [world.new.lora_name]
    assert two.loaded() == [{world.new.lora_name}] * 2


def test_the_set_survives_a_restart(world: World, one: TestFleet) -> None:
    served = one.serve()
    served.swap(world.new)
    again = AdapterSet(one)
    assert names(again) == [world.new.lora_name]


def test_a_recipe_that_changed_is_followed_at_a_restart(world: World, one: TestFleet) -> None:
    served = one.serve()
    served.swap(world.new)
    trained_again = world.adapter("tickets", seed=3)
    spec = server_spec(world.folder, world.model, [trained_again])
    assert names(AdapterSet(TestFleet(spec))) == [trained_again.lora_name]


def test_an_unloaded_adapter_stays_away_after_a_restart(world: World, one: TestFleet) -> None:
    served = one.serve()
    served.unload("tickets")
    assert one.loaded() == [set()]
    assert names(AdapterSet(one)) == []


def test_the_room_of_a_server_does_not_hang_on_what_is_loaded_now(world: World) -> None:
    """Adapters that were remembered count, and what was unloaded leaves its room behind."""
    spec = server_spec(world.folder, world.model, [world.old])
    large = world.adapter("billing", seed=5, rank=16)
    roomy = spec.with_room((large,))
    for loaded in ((), (world.old,), (large, world.old)):
        deployment = roomy.deployment(loaded)
        assert (deployment.lora, deployment.live) == (True, True)
        assert (deployment.slots, deployment.max_rank) == (2, 16)
    assert spec.with_room(()).deployment(()).max_rank == 4
    asked = server_spec(world.folder, world.model, [world.old], adapter_slots=7, max_rank=64)
    assert (asked.with_room(()).section.adapter_slots, asked.with_room(()).section.max_rank) == (
        7,
        64,
    )


def test_a_server_without_adapters_gets_no_room_for_them(world: World) -> None:
    assert not server_spec(world.folder, world.model, []).with_room(()).deployment(()).lora
    still = server_spec(world.folder, world.model, [world.old], live_adapters=False)
    assert still.with_room((world.old,)) == still


def test_a_canary_is_promoted_or_aborted(world: World, one: TestFleet) -> None:
    served = one.serve()
    served.canary(world.new, 0.1, "canary")
    stable, canary = one.routes[0].targets
    assert (stable.label, stable.weight, canary.label, canary.weight) == (
        "stable",
        0.9,
        "canary",
        0.1,
    )
    assert one.loaded() == [{world.old.lora_name, world.new.lora_name}]
    served.abort("tickets")
    assert one.loaded() == [{world.old.lora_name}]
    assert one.routes[0].targets[0].weight == 1.0
    served.canary(world.new, 0.5, "canary")
    served.promote("tickets")
    assert one.loaded() == [{world.new.lora_name}]
    assert [t.model_id for t in one.routes[0].targets] == [world.new.lora_name]


def test_a_canary_that_became_stable_by_a_swap_is_loaded_once(world: World, one: TestFleet) -> None:
    served = one.serve()
    served.canary(world.new, 0.1, "canary")
    served.swap(world.new)  # `champion` moves to what `challenger` is
    assert one.loaded() == [{world.new.lora_name}]
    assert {t.model_id for t in one.routes[0].targets} == {world.new.lora_name}
    third = world.adapter("tickets", seed=3)
    served.swap(third, "canary")  # and `challenger` to the next
    assert one.loaded() == [{world.new.lora_name, third.lora_name}]
    assert [t.weight for t in one.routes[0].targets] == [0.9, 0.1]


def test_the_stable_version_is_no_canary(world: World, idle: TestFleet) -> None:
    with pytest.raises(UsageError, match="which is the stable version already"):
        idle.serve().canary(world.old, 0.1, "canary")


def test_a_second_canary_is_refused(world: World, one: TestFleet) -> None:
    served = one.serve()
    served.canary(world.new, 0.1, "canary")
    with pytest.raises(UsageError, match="has a canary already") as error:
        served.canary(world.adapter("tickets", seed=3), 0.1, "canary")
    assert "toolkit adapters promote tickets" in str(error.value.hint)


def test_loading_leaves_one_slot_for_swaps(world: World, idle: TestFleet) -> None:
    served = idle.serve()
    billing = world.adapter("billing", seed=5)
    with pytest.raises(UsageError) as error:
        served.load(billing)
    assert error.value.message == (
        "no adapter slot is free: the engine has 2 (1 loaded, 1 kept free for swaps), and this needs 1 more"
    )
    assert error.value.hint == (
        "set serve.adapter_slots: 3 in the recipe and start the server again, or unload an adapter"
    )


def test_loading_adds_a_name_where_there_is_room(world: World) -> None:
    fleet = world.fleet(adapter_slots=3)
    try:
        served = fleet.serve()
        billing = world.adapter("billing", seed=5)
        served.load(billing)
        assert [route.name for route in fleet.routes] == ["tickets", "billing"]
        assert fleet.ask("billing", 0, 1)[0] == billing.lora_name
        with pytest.raises(UsageError, match="loaded already"):
            served.load(world.adapter("billing", seed=6))
    finally:
        fleet.close()


def test_a_rank_above_the_engines_is_refused_with_both_numbers(
    world: World, idle: TestFleet
) -> None:
    served = idle.serve()  # rank 4, and vLLM makes room for 8
    with pytest.raises(UsageError) as error:
        served.swap(world.adapter("tickets", seed=7, rank=16))
    assert "has rank 16" in error.value.message
    assert "room for rank 8" in error.value.message
    assert error.value.hint == "set serve.max_rank: 16 in the recipe and start the server again"


def test_what_preflight_refuses_is_not_loaded(world: World, idle: TestFleet) -> None:
    served = idle.serve()
    with pytest.raises(PreflightError, match="uses DoRA"):
        served.swap(world.adapter("tickets", seed=8, use_dora=True))


def test_a_folder_that_changed_since_is_refused(world: World, idle: TestFleet) -> None:
    served = idle.serve()
    (world.new.place / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="has digest") as error:
        served.swap(world.new)
    assert "toolkit adapters swap tickets SOURCE" in str(error.value.hint)


def test_the_bases_name_is_taken(world: World, idle: TestFleet) -> None:
    with pytest.raises(UsageError, match="taken by the base"):
        idle.serve().load(world.adapter("demo-base", seed=9))


def test_an_unknown_name_gets_the_nearest(world: World, idle: TestFleet) -> None:
    with pytest.raises(UsageError, match="did you mean 'tickets'"):
        idle.serve().unload("ticket")


def test_without_replicas_nothing_changes(world: World, idle: TestFleet) -> None:
    served = idle.serve()
    with pytest.raises(EngineError, match="no replica is ready"):
        served.swap(world.new)
    assert names(served) == [world.old.lora_name]


def test_while_the_front_is_down_the_old_version_stays_loaded(world: World, one: TestFleet) -> None:
    served = one.serve()
    one.front_is_up = False
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(served.swap, world.new)
        wait_until(lambda: names(served) == [world.new.lora_name])
        time.sleep(0.3)
        assert one.loaded() == [{world.old.lora_name, world.new.lora_name}]
        one.front_is_up = True  # it starts with the newest table
        assert swap.result().unloaded == (world.old.lora_name,)
    assert one.routes[0].targets[0].model_id == world.new.lora_name


def test_a_damaged_memory_says_what_to_do(world: World, idle: TestFleet) -> None:
    (idle.spec.place / "adapters.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read") as error:
        AdapterSet(idle)
    assert "starts with the adapters of the recipe" in str(error.value.hint)


def test_the_control_socket_lists_and_orders(world: World, one: TestFleet) -> None:
    served = one.serve()
    status, answer = served.handle("POST", "/adapters/swap", {"spec": vars(world.new)})
    assert (status, answer["loaded"]) == (200, (world.new.lora_name,))
    status, answer = served.handle("GET", "/adapters", {})
    assert status == 200
    row = answer["adapters"][0]
    assert (row["name"], row["version"], row["label"]) == ("tickets", world.new.version, "stable")
    assert (answer["slots"], answer["max_rank"], answer["doing"]) == (2, 8, "")
    assert served.handle("POST", "/adapters/dance", {})[0] == 404


@pytest.mark.parametrize(
    ("order", "body", "said"),
    [
        ("swap", {}, "no adapter in `spec`"),
        ("load", {"spec": {"name": "a"}}, "no adapter in `spec`"),
        ("load", {"spec": {"name": "a b", "path": "/a", "version": "1"}}, "'a b' is not a name"),
        ("unload", {}, "no text in `name`"),
        ("promote", {"name": 3}, "no text in `name`"),
        ("canary", {"weight": "much"}, "no adapter in `spec`"),
    ],
)
def test_an_order_that_cannot_be_read_says_why(idle: TestFleet, order, body, said) -> None:
    with pytest.raises(UsageError, match=said):
        idle.serve().handle("POST", f"/adapters/{order}", body)


@pytest.mark.parametrize("weight", [None, "much", 1.5])
def test_a_canarys_share_is_a_share(world: World, idle: TestFleet, weight) -> None:
    body = {"spec": vars(world.new), "header": "canary", "weight": weight}
    with pytest.raises(UsageError, match="not a share from 0 to 1"):
        idle.serve().handle("POST", "/adapters/canary", body)


def test_what_cannot_be_remembered_is_taken_back(world: World, one: TestFleet) -> None:
    served = one.serve()
    (one.spec.place / "adapters.part").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written") as error:
        served.swap(world.new)
    assert "make room" in str(error.value.hint)
    assert names(served) == [world.old.lora_name]
    assert one.loaded() == [{world.old.lora_name}]


class Registry:
    """Fails as a full disk does, then says what an alias means."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.asked, self.spec = 0, spec

    def resolve(self, source: str, *, remembered: bool) -> Registered:
        assert (source, remembered) == ("models:/tickets@champion", False)
        self.asked += 1
        if self.asked < 3:
            raise OSError(28, "No space left on device")
        return Registered("tickets", "2")

    def fetch(self, registered: Registered) -> Path:
        return self.spec.place

    def tag(self, *_: str) -> None: ...


def test_a_full_disk_does_not_end_the_watch(world: World, one: TestFleet) -> None:
    followed = replace(world.old, source="models:/tickets@champion", registered="models:/tickets/1")
    one.spec = replace(one.spec, adapters=(followed,))
    served = one.serve()
    watch = Watcher(served, Registry(world.new), "demo", 0.02, one.event)
    watch.start()
    wait_until(lambda: names(served) == [world.new.lora_name])
    watch.close()
    said = [values["text"] for event, values in one.told if event == "note"]
    assert said[0] == "aliases are not followed for now: [Errno 28] No space left on device"
    assert sum("not followed" in text for text in said) == 1
