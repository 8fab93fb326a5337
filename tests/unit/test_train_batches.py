import numpy as np
import pytest

from toolkit.data.store import TokenRow, TokenStore
from toolkit.train.batches import collate, lengths_of, rows_with_targets


@pytest.fixture
def store(tmp_path):
    def row(ids, trained):
        return TokenRow(np.array(ids, np.int32), np.array(trained, bool))

    rows = [
        row([10, 11, 12, 13], [0, 0, 1, 1]),
        row([20, 21], [1, 1]),
        row([30, 31, 32], [0, 1, 0]),
        row([40, 41], [0, 0]),
        row([50, 51], [1, 0]),
    ]
    TokenStore.write(tmp_path / "tokens", rows)
    return TokenStore(tmp_path / "tokens")


def test_packed_rows_stand_behind_each_other_and_count_from_zero(store):
    batch = collate(store, [[0, 1], [2]])
    assert batch.ids.tolist() == [[10, 11, 12, 13, 20, 21], [30, 31, 32, 0, 0, 0]]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.tokens == 9
    assert batch.rows == (0, 1, 2)


def test_padding_goes_on_counting_so_that_it_is_no_row_of_its_own(store):
    assert collate(store, [[0, 1], [2]]).positions[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert collate(store, [[0, 1], [1, 2]]).positions[1].tolist() == [0, 1, 0, 1, 2, 3]


def test_only_trained_tokens_are_targets_and_the_token_before_predicts_them(store):
    batch = collate(store, [[0], [2]])
    flat = batch.ids.reshape(-1)
    assert batch.targets.tolist() == [12, 13, 31]
    assert flat[batch.sources].tolist() == [11, 12, 30]
    assert batch.trained_tokens == 3


def test_the_first_token_of_a_row_is_never_predicted_by_the_row_before(store):
    batch = collate(store, [[0, 1]])  # 20 is marked as trained, but 13 must not predict it
    assert batch.targets.tolist() == [12, 13, 21]
    assert batch.ids.reshape(-1)[batch.sources].tolist() == [11, 12, 20]


def test_rows_without_a_target_are_left_out(store):
    assert rows_with_targets(store) == [0, 1, 2]
    assert lengths_of(store, [0, 2]) == [4, 3]
