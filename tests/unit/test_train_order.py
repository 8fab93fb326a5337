import random

import pytest

from toolkit.errors import DataError
from toolkit.recipe.train import TrainSection
from toolkit.train.order import RowLedger, plan_steps

LENGTHS = [random.Random(5).randint(3, 40) for _ in range(101)]
ROWS = list(range(1000, 1101))


def plan(seed=0, **changes):
    return plan_steps(ROWS, LENGTHS, TrainSection(**({"batch_size": 4} | changes)), 64, seed)


def rows_of(steps):
    return [row for step in steps for row in step.rows]


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_sees_each_row_once(packing):
    steps = plan(packing=packing, epochs=3, gradient_accumulation=2)
    for epoch in range(3):
        assert sorted(rows_of(s for s in steps if s.epoch == epoch)) == ROWS


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_differ_in_order_and_the_same_seed_gives_the_same_order(packing):
    first, again, other = (plan(seed, packing=packing, epochs=2) for seed in (1, 1, 2))
    assert first == again
    assert rows_of(first) != rows_of(other)
    assert rows_of(s for s in first if s.epoch == 0) != rows_of(s for s in first if s.epoch == 1)


def test_packed_sequences_fit():
    for step in plan(packing=True):
        for batch in step.batches:
            assert len(batch) <= 4
            assert all(sum(LENGTHS[row - 1000] for row in sequence) <= 64 for sequence in batch)


def test_unpacked_batches_hold_rows_of_similar_length():
    steps = plan(packing=False)
    padded = real = 0
    for step in steps:
        for batch in step.batches:
            lengths = [LENGTHS[sequence[0] - 1000] for sequence in batch]
            padded += max(lengths) * len(lengths)
            real += sum(lengths)
    assert real / padded > 0.9


def test_accumulation_makes_steps_of_several_batches_within_an_epoch():
    steps = plan(packing=False, gradient_accumulation=3, epochs=2)
    assert [len(step.batches) for step in steps] == [3] * 8 + [2] + [3] * 8 + [2]


def test_a_fraction_of_an_epoch_is_its_first_steps():
    assert plan(packing=False, epochs=1.5)[26:] == plan(packing=False, epochs=2)[26:39]


def test_max_steps_goes_over_epochs_or_stops_early():
    assert len(plan(max_steps=3)) == 3
    assert len(plan(max_steps=200)) == 200


def test_no_trained_row_is_a_data_error():
    with pytest.raises(DataError, match="no trained token"):
        plan_steps([], [], TrainSection(), 64, 0)


def test_a_row_that_is_too_long_is_named():
    with pytest.raises(
        DataError, match=r"training row 7 has 65 tokens, more than model\.max_length 64"
    ):
        plan_steps([3, 7], [10, 65], TrainSection(), 64, 0)


def test_the_ledger_of_an_interrupted_run_is_that_of_the_whole():
    steps = plan(epochs=2)
    ledger = RowLedger.of(steps[:7])
    carried = RowLedger(ledger.seen, ledger.digest)  # what a checkpoint stores
    for step in steps[7:]:
        carried.add(step.rows)
    assert carried == RowLedger.of(steps)
    assert carried.seen == 202


def test_the_ledger_notices_a_row_seen_twice_and_another_order():
    steps = plan()
    assert RowLedger.of([*steps, steps[0]]) != RowLedger.of(steps)
    assert RowLedger.of(reversed(steps)).seen == RowLedger.of(steps).seen
    assert RowLedger.of(reversed(steps)).digest != RowLedger.of(steps).digest
