"""Tokenized rows on disk: three flat arrays, memory-mapped, so that a large dataset costs no
memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, NamedTuple

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
        folder: Holds ``ids.npy`` [T] int32, ``trained.npy`` [T] bool and ``offsets.npy`` [rows + 1]
            int64, T being the tokens of all rows together.
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
        with TokenWriter(folder) as writer:
            for row in rows:
                writer.append(row)


class TokenWriter:
    """Writes a :class:`TokenStore` row by row, so that no more than one row is in memory.

    Args:
        folder: Is made; complete once the ``with`` block ends without an error.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.lengths: list[int] = []
        self._folder = folder
        self._ids = (folder / "ids.npy").open("wb")
        self._trained = (folder / "trained.npy").open("wb")

    def __enter__(self) -> TokenWriter:
        self._headers()
        return self

    def append(self, row: TokenRow) -> None:
        """Add a row at the end."""
        self.lengths.append(len(row.ids))
        self._ids.write(row.ids.astype("<i4").tobytes())
        self._trained.write(row.trained.astype(bool).tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import numpy as np

        with self._ids, self._trained:
            if kind is None:
                self._headers()
                offsets = np.cumsum([0, *self.lengths], dtype=np.int64)
                np.save(self._folder / "offsets.npy", offsets)

    def _headers(self) -> None:
        """Write both headers at the start of their files; NumPy keeps room in them for any
        length."""
        total = sum(self.lengths)
        for file, kind in ((self._ids, "<i4"), (self._trained, "|b1")):
            _header(file, kind, total)


def _header(file: IO[bytes], kind: str, length: int) -> None:
    from numpy.lib import format as npy

    file.seek(0)
    npy.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (length,)})
