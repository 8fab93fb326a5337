"""Artifacts are complete or absent; damage is found and named."""

import json

import pytest

from toolkit import artifact
from toolkit.errors import ArtifactError


def made(tmp_path, **files):
    target = tmp_path / "artifacts" / "x" / "0123"
    part = artifact.part_of(target)
    part.mkdir(parents=True)
    for name, text in files.items():
        (part / name).write_text(text)
    return artifact.publish(
        target, {"fingerprint": "0123", "kind": "report", "metrics": {}, "facts": {}}
    )


def test_a_published_artifact_is_found_and_whole(tmp_path):
    done = made(tmp_path, a="one", b="two")
    assert not artifact.part_of(done.path).exists()
    found = artifact.verified(done.path)
    assert found.manifest["files"]["a"]["size"] == 3
    assert set(found.manifest["files"]) == {"a", "b"}


def test_an_unfinished_artifact_is_no_artifact(tmp_path):
    target = tmp_path / "0123"
    artifact.part_of(target).mkdir()
    assert artifact.find(target) is None
    with pytest.raises(ArtifactError, match=r"no artifact at .*0123"):
        artifact.verified(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.unlink(), "a is missing"),
        (lambda p: p.write_text("longer"), "a has 6 bytes, not 3"),
        (lambda p: p.write_text("0ne"), "a has sha256 "),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    done = made(tmp_path, a="one")
    change(done.path / "a")
    assert message in (artifact.damage(done, thorough=True) or "")
    with pytest.raises(ArtifactError, match=f"is damaged: {message}"):
        artifact.verified(done.path)


def test_an_unreadable_manifest_says_what_to_remove(tmp_path):
    done = made(tmp_path)
    (done.path / artifact.MANIFEST).write_text("{")
    with pytest.raises(ArtifactError) as caught:
        artifact.find(done.path)
    assert caught.value.hint == f"remove it: rm -r {done.path}"


def test_publishing_replaces_a_damaged_artifact(tmp_path):
    first = made(tmp_path, a="one")
    (first.path / "a").unlink()
    assert artifact.damage(made(tmp_path, a="one"), thorough=True) is None


def test_the_manifest_is_plain_json(tmp_path):
    done = made(tmp_path, a="one")
    assert json.loads((done.path / "manifest.json").read_text())["fingerprint"] == "0123"
