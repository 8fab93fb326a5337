import pytest

from toolkit.train.schedule import factor, warmup_steps


def test_warmup_rises_to_the_peak_without_a_step_at_zero():
    rates = [factor(step, 20, 4, "cosine") for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_ends_just_above_zero_so_that_the_last_step_learns(schedule):
    assert factor(100, 100, 3, schedule) == pytest.approx(0, abs=1e-12)
    assert 0 < factor(99, 100, 3, schedule) < 0.02


def test_cosine_is_half_and_linear_is_half_in_the_middle():
    assert factor(50, 100, 0, "cosine") == pytest.approx(0.5)
    assert factor(50, 100, 0, "linear") == pytest.approx(0.5)


def test_cosine_and_linear_differ_at_a_quarter():
    assert factor(25, 100, 0, "cosine") == pytest.approx(0.8535533905932737)
    assert factor(25, 100, 0, "linear") == pytest.approx(0.75)


def test_constant_stays_at_the_peak():
    assert {factor(step, 10, 0, "constant") for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("total", "share", "expected"),
    [(100, 0.03, 3), (10, 0.03, 1), (10, 0.0, 0), (10, 1.0, 9), (1, 0.5, 0)],
)
def test_warmup_is_rounded_up_and_leaves_a_step_for_the_peak(total, share, expected):
    assert warmup_steps(total, share) == expected


def test_rates_never_rise_after_the_warmup():
    for schedule in ("cosine", "linear", "constant"):
        rates = [factor(step, 37, 5, schedule) for step in range(5, 37)]
        assert rates == sorted(rates, reverse=True)
