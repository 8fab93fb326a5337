"""Group sizes, calibration rows and reports: what quantization decides without torch."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import PreflightError
from toolkit.quantizers import QUANTIZERS, calibration, report
from toolkit.quantizers.group_size import SIZES, choose_group_size
from toolkit.quantizers.probe import Behaviour
from toolkit.recipe.quantize import CalibrationSection

SMOLLM2 = {"model.layers.0.self_attn.q_proj": 576, "model.layers.0.mlp.down_proj": 1536}


@pytest.mark.parametrize(
    ("widths", "wanted"),
    [((4096, 14336), 128), ((576, 1536), 64), ((96,), 32), ((128,), 128), ((576, 96), 32)],
)
def test_auto_takes_the_largest_group_that_divides_every_layer(widths, wanted):
    assert (
        choose_group_size({f"layer{n}": width for n, width in enumerate(widths)}, "auto") == wanted
    )


def test_a_group_size_that_does_not_divide_names_layer_numbers_and_sizes_that_work():
    with pytest.raises(PreflightError) as error:
        choose_group_size(SMOLLM2, 128)
    assert error.value.message == (
        "group_size is 128, but model.layers.0.self_attn.q_proj has 576 inputs, and 576 / 128 leaves 64"
    )
    assert error.value.hint == "sizes that divide every layer: 64, 32; write group_size: auto"


def test_auto_without_any_fitting_size_names_the_layer_and_the_alternative():
    with pytest.raises(PreflightError) as error:
        choose_group_size({"fine": 64, "odd": 100}, "auto")
    assert (
        error.value.message
        == "no group size fits: odd has 100 inputs, which none of 128, 64, 32 divides"
    )
    assert error.value.hint is not None
    assert "add 'odd' to the section's ignore list" in error.value.hint
    assert "int8" in error.value.hint


def test_explicit_size_without_any_that_fits_says_none():
    with pytest.raises(PreflightError) as error:
        choose_group_size({"odd": 100}, 64)
    assert (
        error.value.hint
        == "sizes that divide every layer: none; add 'odd' to the section's ignore list"
    )


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 40000), min_size=1),
    st.sampled_from(["auto", *SIZES]),
)
def test_a_chosen_size_always_divides(widths, asked):
    try:
        size = choose_group_size(widths, asked)
    except PreflightError:
        assert any(width % (32 if asked == "auto" else asked) for width in widths.values())
    else:
        assert all(width % size == 0 for width in widths.values())


def test_every_method_has_a_quantizer():
    for name in ("gptq", "awq", "bnb", "int8", "fp8"):
        assert callable(QUANTIZERS[name]().quantize)


def test_mix_keeps_the_share_of_general_text():
    mix = calibration.mix(1000, 150, CalibrationSection(rows=100, general=0.25), seed=1)
    assert (len(mix.training), len(mix.general), len(mix)) == (75, 25, 100)


def test_mix_never_takes_a_row_twice_and_repeats_itself():
    section = CalibrationSection(rows=100, general=0.25)
    one, again = (calibration.mix(1000, 150, section, seed=7) for _ in range(2))
    assert one == again
    assert len(set(one.training)) == 75
    assert set(one.general).isdisjoint(one.general_left)
    assert sorted(one.general + one.general_left) == list(range(150))
    assert one.training != calibration.mix(1000, 150, section, seed=8).training


def test_without_training_rows_general_text_calibrates():
    mix = calibration.mix(0, 150, CalibrationSection(rows=64), seed=1)
    assert (len(mix.training), len(mix.general)) == (0, 64)


@pytest.mark.parametrize(
    ("training", "general", "wanted"), [(10, 150, (10, 90)), (1000, 5, (95, 5)), (10, 5, (10, 5))]
)
def test_one_side_stands_in_for_the_other(training, general, wanted):
    mix = calibration.mix(training, general, CalibrationSection(rows=100, general=0.25), seed=1)
    assert (len(mix.training), len(mix.general)) == wanted


def test_general_zero_uses_the_training_rows_alone():
    mix = calibration.mix(1000, 150, CalibrationSection(rows=100, general=0), seed=1)
    assert (len(mix.training), len(mix.general)) == (100, 0)


def test_general_text_is_varied_and_without_repeats():
    rows = calibration.general_text()
    assert len(rows) >= 150
    assert len({json.dumps(row) for row in rows}) == len(rows)
    assert sum("messages" in row for row in rows) >= 40
    for row in rows:
        assert ("text" in row) != ("messages" in row)
        assert "messages" not in row or row["messages"][-1]["role"] == "assistant"


def test_digest_tells_rows_and_their_bounds_apart():
    assert calibration.digest([[1, 2], [3]]) == calibration.digest([(1, 2), (3,)])
    assert calibration.digest([[1, 2], [3]]) != calibration.digest([[1], [2, 3]])


def test_report_shows_sizes_perplexities_and_both_answers(tmp_path):
    manifest = {"method": "gptq", "bits": 4, "group_size": 64, "calibration": {"rows": 32}}
    question = {"messages": [{"role": "user", "content": "Two\nlines?"}]}
    full, small = Behaviour(10.0, ("full ```code```",), 270.0), Behaviour(10.5, ("small",), 113.2)
    report.write(tmp_path, manifest, [question], full=full, quantized=small, seconds=61.4)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["perplexity"] == 10.5
    assert data["generations"] == [
        {"messages": question["messages"], "full": "full ```code```", "quantized": "small"}
    ]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(
        "# gptq, 4 bits, groups of 64\n\nQuantized in 61 s, calibrated on 32 rows.\n"
    )
    assert "| weights, MB | 270.0 | 113.2 |" in text
    assert "| perplexity on held-out rows | 10.000 | 10.500 |" in text
    assert "## Two\n" in text
    assert "````\nfull ```code```\n````" in text


def test_report_without_held_out_rows_has_no_perplexity():
    found = report.numbers(Behaviour(None, (), 2.0), Behaviour(None, (), 1.0), 3.0)
    assert found == {"size_mb": 1.0, "size_mb_full": 2.0, "seconds": 3.0}
