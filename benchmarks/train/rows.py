"""Rows to train on: full ones, and rows as long as real conversations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

MEAN_TOKENS = 600
SIGMA = 1.0
"""Of the logarithm: half of the rows are shorter than 364 tokens, one in a hundred is over 3,700."""


def full_batch(count: int, sequence: int, vocabulary: int, seed: int) -> Any:
    """``count`` rows of ``sequence`` tokens, each token but a row's first a target."""
    import numpy as np

    from toolkit.train.batches import Batch

    random = np.random.default_rng(seed)
    ids = random.integers(3, vocabulary, (count, sequence), dtype=np.int64)
    places = np.arange(count * sequence).reshape(count, sequence)
    return Batch(
        ids=ids,
        positions=np.tile(np.arange(sequence, dtype=np.int64), (count, 1)),
        sources=places[:, :-1].reshape(-1),
        targets=ids[:, 1:].reshape(-1),
        tokens=count * sequence,
        rows=tuple(range(count)),
    )


def log_normal_lengths(count: int, longest: int, seed: int = 11) -> list[int]:
    """Lengths of rows: log-normal with mean :data:`MEAN_TOKENS`, cut to 16 .. ``longest``."""
    import numpy as np

    mean = MEAN_TOKENS * longest / 4096  # the tiny shape has the same ratio of lengths
    mu = float(np.log(mean)) - SIGMA**2 / 2
    drawn = np.random.default_rng(seed).lognormal(mu, SIGMA, count)
    return [int(n) for n in np.clip(drawn, 16, longest)]


def write_store(folder: Path, lengths: list[int], vocabulary: int, seed: int = 13) -> None:
    """A dataset as the data stage leaves it: the first third of a row is the question."""
    import numpy as np

    from toolkit.data.store import TokenRow, TokenStore

    random = np.random.default_rng(seed)
    TokenStore.write(
        folder,
        (
            TokenRow(random.integers(3, vocabulary, n, dtype=np.int32), np.arange(n) >= n // 3)
            for n in lengths
        ),
    )
