"""Chance comes from content hashes: repeatable, and equal rows stay together."""

from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.split import chance, content_id, copies, heldout_ids, keep_most

IDS = [content_id({"text": str(n)}) for n in range(2000)]
ids = st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), max_size=60)


def test_the_id_is_16_hex_digits_and_does_not_depend_on_key_order():
    one = content_id({"messages": [{"role": "user", "content": "ä"}], "tools": []})
    two = content_id({"tools": [], "messages": [{"content": "ä", "role": "user"}]})
    assert one == two
    assert len(one) == 16
    assert int(one, 16) >= 0
    assert one != content_id({"messages": [{"role": "user", "content": "b"}], "tools": []})


def test_the_id_of_a_row_never_changes():
    # Splits of existing datasets depend on it: another value here moves rows between training and held-out.
    assert content_id({"text": "hello"}) == "cbbbdcd27692344d"


@given(st.sampled_from(IDS), st.integers(0, 9))
def test_chance_is_repeatable_and_between_zero_and_one(row, seed):
    assert 0 <= chance(row, "weight", seed) < 1
    assert chance(row, "weight", seed) == chance(row, "weight", seed)


def test_whole_weights_take_every_row_that_often():
    assert {copies(i, 1, 0) for i in IDS} == {1}
    assert {copies(i, 2, 0) for i in IDS} == {2}


def test_half_weights_take_about_half_of_the_rows():
    assert 900 < sum(copies(i, 0.5, 0) for i in IDS) < 1100
    more = [copies(i, 1.5, 0) for i in IDS]
    assert set(more) == {1, 2}
    assert 2900 < sum(more) < 3100


def test_another_seed_chooses_other_rows():
    assert {i for i in IDS if copies(i, 0.5, 0)} != {i for i in IDS if copies(i, 0.5, 1)}
    assert heldout_ids(IDS, 0.1, 0) != heldout_ids(IDS, 0.1, 1)


def test_about_the_fraction_is_held_out():
    assert 160 < len(heldout_ids(IDS, 0.1, 0)) < 240


@given(ids, st.floats(0, 0.99), st.integers(0, 3))
def test_held_out_rows_do_not_depend_on_order_or_repetition(rows, fraction, seed):
    held = heldout_ids(rows, fraction, seed)
    assert held == heldout_ids([*reversed(rows), *rows], fraction, seed)
    assert held <= set(rows)
    if len(set(rows)) >= 2 and fraction > 0:
        assert 1 <= len(held) < len(set(rows))
    if fraction == 0:
        assert not held


def test_more_rows_move_no_row_to_the_other_side():
    before = heldout_ids(IDS[:1000], 0.1, 0)
    after = heldout_ids(IDS, 0.1, 0)
    assert after & set(IDS[:1000]) == before


def test_a_higher_limit_only_adds_rows():
    few, more = keep_most(IDS, 10, 0), keep_most(IDS, 20, 0)
    assert len(few) == 10
    assert few < more
    assert keep_most(IDS, None, 0) == set(IDS)
