"""From rows to the arrays of a forward pass: B sequences, T tokens in the longest, N targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.data.store import TokenStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Position ids alone keep packed rows apart: they restart at 0 with every row, and Transformers
    makes a block-diagonal mask from that, but only without an attention mask and without a cache.
    Padding stands at the end of a sequence and goes on counting: causal attention hides it from
    every real token, and a batch without packing then needs no mask at all.
    """

    ids: NDArray[np.int64]  # [B, T] token ids, 0 as padding
    positions: NDArray[np.int64]  # [B, T] position in the row
    sources: NDArray[
        np.int64
    ]  # [N] index into the flattened [B * T] of the token that predicts a target
    targets: NDArray[np.int64]  # [N] token ids to predict
    tokens: int  # tokens without padding
    rows: tuple[int, ...]

    @property
    def trained_tokens(self) -> int:
        """N, the tokens that the loss averages over."""
        return len(self.targets)


def collate(store: TokenStore, sequences: Sequence[Sequence[int]]) -> Batch:
    """Lay rows behind each other, one line per sequence, padded to the longest.

    The first token of a row is never a target: what stands before it belongs to another row.
    """
    import numpy as np

    loaded = [[store[row] for row in sequence] for sequence in sequences]
    width = max(sum(len(row.ids) for row in rows) for rows in loaded)
    ids: NDArray[np.int64] = np.zeros((len(loaded), width), np.int64)
    positions: NDArray[np.int64] = np.zeros((len(loaded), width), np.int64)
    sources: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    for line, rows in enumerate(loaded):
        start = length = 0
        for row in rows:
            length = len(row.ids)
            ids[line, start : start + length] = row.ids
            positions[line, start : start + length] = np.arange(length)
            trained = np.flatnonzero(row.trained[1:])  # t stands for target t + 1, predicted at t
            sources.append(line * width + start + trained)
            targets.append(row.ids[trained + 1].astype(np.int64))
            start += length
        positions[line, start:] = np.arange(length, length + width - start)
    return Batch(
        ids,
        positions,
        np.concatenate(sources),
        np.concatenate(targets),
        sum(len(row.ids) for rows in loaded for row in rows),
        tuple(row for sequence in sequences for row in sequence),
    )


def rows_with_targets(store: TokenStore) -> list[int]:
    """Rows that the loss can learn from: some token but the first is trained."""
    return [row for row in range(len(store)) if store[row].trained[1:].any()]


def lengths_of(store: TokenStore, rows: Sequence[int]) -> list[int]:
    """Tokens of each row."""
    return [int(store.offsets[row + 1] - store.offsets[row]) for row in rows]


def lengths_array(store: TokenStore, rows: Sequence[int]) -> NDArray[np.int64]:
    """The same as an array, [rows], which is quicker to reckon with."""
    import numpy as np

    at = np.asarray(rows)
    found: NDArray[np.int64] = (store.offsets[at + 1] - store.offsets[at]).astype(np.int64)
    return found


def counts_of(store: TokenStore, rows: Sequence[int]) -> tuple[int, int]:
    """Tokens, and trained tokens, of rows: what :func:`collate` would count, on every rank alike."""
    trained = sum(int(store[row].trained[1:].sum()) for row in rows)
    return sum(lengths_of(store, rows)), trained
