"""``toolkit keys`` and ``toolkit dashboards``: what they print, and that they keep a secret."""

import json
import stat

import pytest
from click.testing import CliRunner

from toolkit.cli import toolkit
from toolkit.errors import UsageError
from toolkit.gateway.keys import read


@pytest.fixture
def run(tmp_path):
    def run(*words):
        command = [*words, "--workspace", str(tmp_path / "ws")]
        result = CliRunner().invoke(toolkit, command, catch_exceptions=True)
        if isinstance(result.exception, UsageError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    run.file = tmp_path / "ws" / "keys.json"
    return run


def test_standard_output_is_the_key_and_nothing_else(run):
    result = run("keys", "create", "app")
    text = result.stdout.strip()
    assert read(run.file).match(text).name == "app"
    assert "shown this once" in result.stderr
    assert text not in result.stderr
    assert stat.S_IMODE(run.file.stat().st_mode) == 0o600


def test_all_options_of_create(run):
    words = (
        "keys create app --models a,b --requests-per-minute 6 --tokens-per-minute 700 --expires 30d"
    )
    made = json.loads(run(*words.split(), "--tenant", "acme", "--class", "batch", "--json").stdout)
    assert made["key"].startswith("toolkit_" + made["id"])
    assert made["models"] == ["a", "b"]
    assert (made["requests_per_minute"], made["tokens_per_minute"]) == (6, 700)
    assert (made["tenant"], made["key_class"], made["state"]) == ("acme", "batch", "active")
    assert made["expires_at"] - made["created_at"] == pytest.approx(30 * 86_400, abs=5)
    assert "digest" not in made


def test_a_key_for_prometheus_opens_no_model(run):
    made = json.loads(run("keys", "create", "prometheus", "--metrics-only", "--json").stdout)
    assert made["models"] == ["/metrics"]


def test_list_shows_who_may_what_and_no_key(run):
    text = run("keys", "create", "app", "--models", "a").stdout.strip()
    run("keys", "create", "old")
    run("keys", "revoke", "old")
    shown = run("keys", "list").stdout
    assert "app" in shown
    assert "old" not in shown
    assert text not in shown
    every = json.loads(run("keys", "list", "--all", "--json").stdout)
    assert [(k["name"], k["state"]) for k in every] == [("app", "active"), ("old", "revoked")]
    assert all("digest" not in k and "key" not in k for k in every)


def test_an_empty_list_says_how_to_make_one(run):
    assert "toolkit keys create NAME makes one" in run("keys", "list").stdout
    assert json.loads(run("keys", "list", "--json").stdout) == []
    assert not run.file.exists()


def test_revoke_by_name_or_id(run):
    made = json.loads(run("keys", "create", "app", "--json").stdout)
    assert f"revoked app ({made['id']})" in run("keys", "revoke", made["id"]).stdout
    assert read(run.file).keys[made["id"]].state(0) == "revoked"


def test_rotate_shows_the_new_key(run):
    old = run("keys", "create", "app", "--models", "a").stdout.strip()
    new = run("keys", "rotate", "app").stdout.strip()
    keys = read(run.file)
    assert keys.match(new).models == ("a",)
    assert keys.match(old).state(0) == "revoked"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("create a/b", "'a/b' is not a name"),
        ("create app --models a,", "'' is not a name"),
        ("create app --class jwt", "class 'jwt' is reserved"),
        ("create app --expires soon", "'soon' is not a time"),
        ("create app --models a --metrics-only", "exclude each other"),
        ("revoke nobody", "no living key is named 'nobody'"),
        ("rotate nobody", "no living key is named 'nobody'"),
    ],
)
def test_mistakes(run, words, says):
    with pytest.raises(UsageError, match=says):
        run("keys", *words.split())
    assert not run.file.exists() or read(run.file).keys == {}
