"""Digests are those of the bytes, remembered while a file does not change."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from toolkit import digests

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_a_large_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"a" * (1 << 21))
    first = digests.of_file(file)
    assert first == hashlib.sha256(b"a" * (1 << 21)).hexdigest()
    monkeypatch.setattr(digests, "_read", lambda path: "read again")
    assert digests.of_file(file) == first
    file.write_bytes(b"b" * (1 << 21))
    assert digests.of_file(file) == "read again"


def test_a_folder_is_the_names_and_bytes_of_its_files(tmp_path):
    (tmp_path / "a").write_text("1")
    before = digests.of_path(tmp_path)
    (tmp_path / ".hidden").write_text("x")
    assert digests.of_path(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert digests.of_path(tmp_path) != before


@given(st.dictionaries(st.text(), JSON))
def test_the_order_of_keys_does_not_matter(value):
    assert digests.of_json(value) == digests.of_json(dict(reversed(value.items())))
