"""Packing puts every row into one sequence, wastes little and repeats itself."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.packing import efficiency, pack

rows = st.lists(st.integers(0, 50), max_size=200)


@given(rows, st.integers(50, 200), st.integers(0, 5))
def test_every_row_stands_in_one_sequence_that_is_not_too_long(lengths, max_length, seed):
    sequences = pack(lengths, max_length, seed)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in sequence) <= max_length for sequence in sequences)
    assert all(sequences)


@given(rows, st.integers(0, 5))
def test_equal_arguments_give_equal_sequences(lengths, seed):
    assert pack(lengths, 64, seed) == pack(lengths, 64, seed)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=200))
def test_no_two_sequences_could_be_one(lengths):
    fills = sorted(sum(lengths[row] for row in sequence) for sequence in pack(lengths, 50, 0))
    if len(fills) > 1:
        assert fills[0] + fills[1] > 50


def test_another_seed_gives_another_order():
    assert pack([10] * 50, 40, 0) != pack([10] * 50, 40, 1)


def test_the_best_fit_is_taken():
    # After 7 and 6, the 4 fits only the 6 exactly, the 3 only the 7: first fit would need a third sequence.
    assert sorted(sorted(s) for s in pack([7, 6, 4, 3], 10, 0)) == [[0, 3], [1, 2]]


def test_no_rows_need_no_sequence():
    assert pack([], 10, 0) == []
    assert efficiency([], 0, 10) == 0.0


def test_a_row_longer_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="row 1 has 11 tokens, a sequence has 10"):
        pack([3, 11], 10, 0)


def test_efficiency_is_the_share_of_real_tokens():
    assert efficiency([5, 5, 10], 2, 10) == 1.0
    assert efficiency([5], 1, 10) == 0.5


def test_many_rows_pack_in_seconds_and_tightly():
    chance = random.Random(0)
    lengths = [min(2048, int(chance.lognormvariate(5.5, 0.8))) for _ in range(200_000)]
    start = time.process_time()
    sequences = pack(lengths, 2048, 0)
    assert time.process_time() - start < 10
    assert efficiency(lengths, len(sequences), 2048) > 0.99
