"""What is written row by row reads back row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.store import TokenRow, TokenStore, TokenWriter


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=9), max_size=9
    )
)
def test_rows_read_back_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("store") / "tokens"
    written = [
        TokenRow(
            np.array([i for i, _ in r], dtype=np.int32), np.array([t for _, t in r], dtype=bool)
        )
        for r in rows
    ]
    TokenStore.write(folder, written)
    store = TokenStore(folder)
    assert len(store) == len(rows)
    for n, row in enumerate(written):
        assert store[n].ids.tolist() == row.ids.tolist()
        assert store[n].trained.tolist() == row.trained.tolist()


def test_an_interrupted_write_is_no_store(tmp_path):
    row = TokenRow(np.array([1], dtype=np.int32), np.array([True]))
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "t") as writer:
        writer.append(row)
        raise RuntimeError
    with pytest.raises(FileNotFoundError):
        TokenStore(tmp_path / "t")
