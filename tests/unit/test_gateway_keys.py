"""API keys: made, kept as hashes, revoked in a running front."""

import asyncio
import hmac
import json
import multiprocessing
import os
import re
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import ToolkitError, UsageError
from toolkit.gateway import keys as module
from toolkit.gateway.keys import Keys, editing, lifetime_s, read
from toolkit.gateway.live_keys import LiveKeys
from toolkit.gateway.openai import ApiError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ws" / "keys.json"


def create(path, name="app", **fields):
    with editing(path) as keys:
        return keys.create(name, **fields)


def check(live, text):
    return asyncio.run(live.check(text))


def refused(live, text):
    with pytest.raises(ApiError) as caught:
        check(live, text)
    return caught.value


def test_a_key_is_recognisable_and_holds_256_random_bits():
    texts = {Keys().create("a")[1] for _ in range(50)}
    assert len(texts) == 50
    for text in texts:
        assert re.fullmatch(r"toolkit_[0-9A-Za-z]{10}_[0-9A-Za-z]{49}", text)
    assert 62**module.SECRET_DIGITS > 2**256


def test_the_file_holds_no_key_and_is_for_its_owner_alone(path):
    key, text = create(path)
    kept = path.read_text()
    assert text not in kept
    assert text.split("_")[2] not in kept
    assert key.digest in kept
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".part")] == []


def test_the_hash_is_an_hmac_with_the_pepper_of_the_file(path):
    key, text = create(path)
    values = json.loads(path.read_text())
    pepper = bytes.fromhex(values["pepper"])
    assert len(pepper) == 32
    assert key.digest == hmac.new(pepper, text.encode(), "sha256").hexdigest()
    assert Keys().pepper != Keys().pepper


def test_a_key_matches_itself_and_nothing_else(path):
    key, text = create(path)
    keys = read(path)
    assert keys.match(text) == key
    other = Keys().create("x")[1]
    for wrong in ("", "x", text[:-1], text + "0", text.upper(), other, f" {text}", f"{text}\n"):
        assert keys.match(wrong) is None, wrong


@given(place=st.integers(0, 67), letter=st.sampled_from(module.ALPHABET))
def test_one_wrong_letter_is_refused(place, letter):
    keys = Keys()
    _, text = keys.create("a")
    wrong = text[:place] + letter + text[place + 1 :]
    assert (keys.match(wrong) is None) == (wrong != text)


def test_a_mistyped_key_is_refused_by_its_checksum_before_any_hash(monkeypatch):
    keys = Keys()
    _, text = keys.create("a")
    monkeypatch.setattr(Keys, "digest", lambda *_: pytest.fail("a hash was made"))
    assert keys.match(text[:-1] + ("0" if text[-1] != "0" else "1")) is None


def test_secrets_are_compared_in_constant_time_and_unknown_ids_cost_the_same(monkeypatch):
    keys = Keys()
    _, text = keys.create("a")
    unknown = Keys().create("b")[1]
    compared = []

    def spy(a, b):
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(
        module, "hmac", type("h", (), {"compare_digest": spy, "digest": hmac.digest})
    )
    keys.match(text)
    assert len(compared) == 2  # checksum and secret
    keys.match(unknown)
    assert len(compared) == 4
    assert all(len(a) == len(b) for a, b in compared)


def test_two_living_keys_cannot_have_one_name(path):
    create(path, "app")
    with pytest.raises(UsageError, match="a living key is named 'app' already") as caught:
        create(path, "app")
    assert caught.value.hint == "toolkit keys rotate app, or choose another name"
    with editing(path) as keys:
        keys.revoke("app")
    create(path, "app")


@pytest.mark.parametrize("name", ["none", "jwt"])
def test_classes_that_metrics_use_for_others_are_reserved(path, name):
    with pytest.raises(UsageError, match=f"class '{name}' is reserved"):
        create(path, key_class=name)
    assert not path.exists()


def test_a_failed_edit_changes_nothing(path):
    create(path, "app")
    before = path.read_bytes()

    def edit():
        with editing(path) as keys:
            keys.create("other")
            keys.revoke("nobody")

    with pytest.raises(UsageError, match="no living key is named 'nobody'"):
        edit()
    assert path.read_bytes() == before


def _create_some(path, worker):
    for i in range(5):
        create(path, f"w{worker}-{i}")


def test_writers_wait_for_each_other(path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_create_some, args=(path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert len(read(path).keys) == 20


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_file_open_to_others_is_refused(path, mode):
    create(path)
    path.chmod(mode)
    with pytest.raises(ToolkitError, match=rf"open to others \(mode 0{mode:o}\)") as caught:
        read(path)
    assert "chmod 600" in caught.value.hint
    with pytest.raises(ToolkitError, match="open to others"):
        LiveKeys(path)


def test_a_file_of_another_user_is_refused(path, monkeypatch):
    create(path)
    monkeypatch.setattr(module.os, "geteuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid == 0:
        os.chown(path, 4242, -1)
    with pytest.raises(ToolkitError, match="belongs to user"):
        read(path)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"version": 1, "keys": [{}], "pepper": "00"}', "\x00", '{"version": 1}'],
)
def test_a_damaged_file_is_an_error_that_says_so(path, text):
    create(path)
    path.write_text(text)
    with pytest.raises(ToolkitError, match="is not a key file") as caught:
        read(path)
    assert caught.value.hint == "restore it, or remove it and make new keys"


def test_a_file_of_a_newer_toolkit_is_not_guessed_at(path):
    create(path)
    path.write_text(json.dumps({"version": 2}))
    with pytest.raises(ToolkitError, match="has version 2, and this toolkit reads 1"):
        read(path)


def test_fields_survive_the_file(path):
    key, _ = create(
        path,
        models=("a", "b"),
        requests_per_minute=3,
        tokens_per_minute=4,
        tenant="acme",
        key_class="batch",
        expires_at=time.time() + 9,
    )
    assert read(path).keys[key.id] == key


def test_rotation_gives_the_same_rights_and_ends_the_old_key(path):
    old, old_text = create(path, models=("a",), tenant="acme", expires_at=time.time() + 100)
    with editing(path) as keys:
        new, new_text = keys.rotate("app")
    live = LiveKeys(path)
    assert check(live, new_text) == new
    assert (new.name, new.models, new.tenant) == ("app", ("a",), "acme")
    assert new.expires_at == pytest.approx(time.time() + 100, abs=5)
    assert new.id != old.id
    assert "is revoked" in refused(live, old_text).message


def test_rotation_with_overlap_lets_both_in_until_it_ends(path):
    _, old_text = create(path)
    with editing(path) as keys:
        _, new_text = keys.rotate("app", overlap_s=3600)
        assert keys.find("app").state(time.time()) == "active"
    live = LiveKeys(path)
    assert check(live, new_text).name == "app"
    old = check(live, old_text)
    assert old.expires_at == pytest.approx(time.time() + 3600, abs=5)
    assert old.name == f"app.{old.id}"


def test_overlap_never_makes_a_key_live_longer(path):
    old, _ = create(path, expires_at=time.time() + 10)
    with editing(path) as keys:
        keys.rotate("app", overlap_s=3600)
        assert keys.keys[old.id].expires_at == old.expires_at


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 2_592_000), ("12h", 43_200), ("1w", 604_800), ("5m", 300), ("9s", 9)],
)
def test_lifetimes(text, seconds):
    assert lifetime_s(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "0d", "-1d", "1.5d", "30 d", "٣d", "1y"])
def test_what_is_no_lifetime(text):
    with pytest.raises(UsageError, match="is not a time") as caught:
        lifetime_s(text)
    assert caught.value.hint == "write 12h, 30d or 8w"


def test_a_running_front_sees_new_and_revoked_keys_within_a_second(path):
    _, first = create(path, "first")
    clock = Clock()
    live = LiveKeys(path, clock)
    _, second = create(path, "second")
    assert refused(live, second).status == 401  # not looked yet
    clock.now += 1.0
    assert check(live, second).name == "second"
    with editing(path) as keys:
        keys.revoke("first")
    clock.now += 1.0
    error = refused(live, first)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert "is revoked" in error.message


def test_a_key_revoked_while_the_front_reads_the_file_is_seen(path, monkeypatch):
    _, text = create(path, "ci")
    clock = Clock()

    def read_then_revoke(file):
        found = read(file)
        with editing(path) as keys:
            keys.revoke("ci")
        return found

    monkeypatch.setattr("toolkit.gateway.live_keys.read", read_then_revoke)
    live = LiveKeys(path, clock)
    monkeypatch.undo()
    clock.now += 1.0
    assert "is revoked" in refused(live, text).message


def test_the_file_is_looked_at_once_a_second_at_most(path, monkeypatch):
    _, text = create(path)
    clock = Clock()
    live = LiveKeys(path, clock)
    looks = []
    identity = live._identity
    monkeypatch.setattr(live, "_identity", lambda: looks.append(1) or identity())
    for _ in range(1000):
        clock.now += 0.01
        check(live, text)
    assert len(looks) in (9, 10)


def test_an_expired_key_ends_without_any_change_of_the_file(path):
    _, text = create(path, expires_at=time.time() + 0.2)
    live = LiveKeys(path)
    check(live, text)
    time.sleep(0.25)
    error = refused(live, text)
    assert error.message.endswith("is expired.")


def test_a_file_that_cannot_be_trusted_lets_nobody_in_until_it_is_mended(path):
    _, text = create(path)
    clock = Clock()
    live = LiveKeys(path, clock)
    good = path.read_text()

    path.write_text("{")
    clock.now += 1
    error = refused(live, text)
    assert (error.status, error.headers["Retry-After"]) == (503, "5")
    assert "is not a key file" in live.failure.message

    path.write_text(good)
    clock.now += 1
    check(live, text)

    path.chmod(0o644)
    clock.now += 1
    assert refused(live, text).status == 503
    path.chmod(0o600)
    clock.now += 1
    check(live, text)

    path.unlink()
    clock.now += 1
    assert refused(live, text).status == 401


def test_many_requests_at_the_moment_of_a_change_read_the_file_once(path, monkeypatch):
    from toolkit.gateway import live_keys

    _, text = create(path)
    clock = Clock()
    live = LiveKeys(path, clock)
    create(path, "other")
    clock.now += 1
    reads = []
    monkeypatch.setattr(live_keys, "read", lambda p: reads.append(1) or read(p))

    async def all_at_once():
        return await asyncio.gather(*(live.check(text) for _ in range(100)))

    assert len(asyncio.run(all_at_once())) == 100
    assert len(reads) == 1
