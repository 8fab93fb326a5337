"""Packing: which rows share a sequence. Pure; who builds batches must keep the rows apart.

Best-fit decreasing (Johnson 1973): longest rows first, each into the fullest sequence that still
has room. It uses at most 11/9 of the smallest possible number of sequences, plus one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Put rows into sequences of at most ``max_length`` tokens, each row into exactly one.

    Args:
        lengths: Tokens of each row.
        max_length: Tokens that fit into a sequence.
        seed: Decides which of equally long rows go together, the order in a sequence, and the order
            of sequences.

    Returns:
        Row numbers of each sequence. Equal arguments give equal sequences. A million rows take
        seconds.

    Raises:
        ValueError: A row is longer than a sequence.
    """
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    order = list(range(len(lengths)))
    chance.shuffle(order)
    order.sort(key=lengths.__getitem__, reverse=True)
    if order and lengths[order[0]] > max_length:
        raise ValueError(
            f"row {order[0]} has {lengths[order[0]]} tokens, a sequence has {max_length}"
        )
    sequences = _best_fit(order, lengths, max_length)
    for sequence in sequences:
        chance.shuffle(sequence)
    chance.shuffle(sequences)
    return sequences


def efficiency(lengths: Sequence[int], sequences: int, max_length: int) -> float:
    """Share of the tokens of ``sequences`` full sequences that are real; 1 is no padding."""
    return sum(lengths) / (sequences * max_length) if sequences else 0.0


def _best_fit(order: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room left -> sequences
    rooms = (
        0  # bit r is set when by_room[r] is not empty: the best fit is one shift and one lowest bit
    )
    for row in order:
        length = lengths[row]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            sequences[sequence].append(row)
        else:
            room, sequence = max_length, len(sequences)
            sequences.append([row])
        by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    return sequences
