"""Tokenized rows on disk: three flat arrays, memory-mapped, so that a large dataset costs no memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TokenRow(NamedTuple):
    """One rendered conversation. N is its number of tokens."""

    ids: NDArray[np.int32]  # [N] token ids
    trained: NDArray[np.bool_]  # [N] whether the token is a target of the loss


class TokenStore:
    """Rows of one split, in the order of its ``.jsonl``: ``store[i] -> TokenRow``.

    Args:
        folder: Holds ``ids.npy`` [T] int32, ``trained.npy`` [T] bool and ``offsets.npy`` [rows +
            1] int64, T being the tokens of all rows together.
    """

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self._ids = np.load(folder / "ids.npy", mmap_mode="r")
        self._trained = np.load(folder / "trained.npy", mmap_mode="r")
        self.offsets: NDArray[np.int64] = np.load(folder / "offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> TokenRow:
        start, end = self.offsets[row], self.offsets[row + 1]
        return TokenRow(self._ids[start:end], self._trained[start:end])

    @staticmethod
    def write(folder: Path, rows: Iterable[TokenRow]) -> None:
        """Write rows into ``folder``, which is made."""
        import numpy as np

        folder.mkdir(parents=True)
        kept = list(rows)
        lengths = [len(row.ids) for row in kept]
        empty = [np.zeros(0)]
        np.save(
            folder / "ids.npy", np.concatenate([row.ids for row in kept] or empty).astype(np.int32)
        )
        np.save(
            folder / "trained.npy",
            np.concatenate([row.trained for row in kept] or empty).astype(bool),
        )
        np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
