"""Which values are tried.

Every choice is a function of the section and of the trials before it: no sampler has a state of its own that could be
lost, or that could disagree with what is on disk.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from toolkit.errors import NotInstalledError, UsageError
from toolkit.recipe.sweep import RangeSection, SweepSection

MOST = 1000
"""Trials that one sweep may have: each is checked before the first one starts."""
AT_RANDOM = 5
"""Trials that optuna draws at random before it has something to go by."""
REDRAWS = 100
"""How often another one is drawn in place of one that was tried."""

Assignment = dict[str, Any]
"""Value by key of the recipe."""


@dataclass(frozen=True)
class Told:
    """What is known of a trial when the next one is chosen: it runs while it has neither value nor failed."""

    values: Mapping[str, Any]
    value: float | None
    failed: bool


def planned(section: SweepSection) -> list[Assignment]:
    """All trials, where they are known before any has run: grid and random.

    Raises:
        UsageError: There are too many.
    """
    if section.method == "optuna":
        return []
    axes = [_points(one) for one in section.over.values()]
    count = math.prod(map(len, axes)) if section.method == "grid" else section.trials or 0
    if count > MOST:
        raise UsageError(
            f"sweep: {count} trials, and {MOST} are the most",
            "give fewer values, or method random or optuna with fewer trials",
        )
    if section.method == "grid":
        return [dict(zip(section.over, one, strict=True)) for one in itertools.product(*axes)]
    return _drawn(section, count)


def _points(values: tuple[Any, ...] | RangeSection) -> tuple[Any, ...]:
    """The values of one key in a grid."""
    if not isinstance(values, RangeSection):
        return values
    last = (values.points or 2) - 1
    return tuple(dict.fromkeys(_at(values, number / last) for number in range(last + 1)))


def _at(values: RangeSection, share: float) -> int | float:
    """The value at a share of the way through a range, short enough to be read and typed again."""
    if values.log:
        low, high = math.log(values.low), math.log(values.high)
        return _short(values, math.exp(low + share * (high - low)))
    return _short(values, values.low + share * (values.high - values.low))


def _short(values: RangeSection, value: float) -> int | float:
    near = round(value) if values.whole else float(f"{value:.4g}")
    return min(max(near, values.low), values.high)


def _drawn(section: SweepSection, count: int) -> list[Assignment]:
    """Random trials, no two alike; fewer where there are not so many. More trials begin with the same ones."""
    dice, found = random.Random(section.seed), dict[str, Assignment]()  # noqa: S311 - no secret
    for _ in range(count + REDRAWS):
        one = {key: _draw(values, dice) for key, values in section.over.items()}
        found.setdefault(json.dumps(one, sort_keys=True), one)
        if len(found) == count:
            break
    return list(found.values())


def _draw(values: tuple[Any, ...] | RangeSection, dice: random.Random) -> Any:
    if not isinstance(values, RangeSection):
        return dice.choice(values)
    if values.whole and not values.log:
        return dice.randint(int(values.low), int(values.high))
    return _at(values, dice.random())


def suggested(section: SweepSection, told: Sequence[Told], *, minimize: bool) -> Assignment:
    """The next trial by Optuna's tree-structured Parzen estimator, from all that were chosen before.

    Raises:
        NotInstalledError: Optuna is not there.
    """
    require(section)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = {key: _distribution(values) for key, values in section.over.items()}
    sampler = optuna.samplers.TPESampler(
        seed=section.seed * MOST + len(told), n_startup_trials=AT_RANDOM, constant_liar=True
    )
    study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=sampler)
    states = optuna.trial.TrialState
    for one in told:
        known = states.RUNNING if one.value is None else states.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                params={key: _index(section, key, value) for key, value in one.values.items()},
                distributions=axes,
                value=one.value,
                state=states.FAIL if one.failed and one.value is None else known,
            )
        )
    seen = [one.values for one in told]
    for _ in range(REDRAWS):  # what was tried is known: another one tells more, if there is one
        asked = study.ask(axes).params
        found = {key: _value(values, asked[key]) for key, values in section.over.items()}
        if found not in seen:
            break
    return found


def require(section: SweepSection) -> None:
    """Refuse ``method: optuna`` without Optuna.

    Raises:
        NotInstalledError: It is not there.
    """
    if section.method == "optuna" and find_spec("optuna") is None:
        raise NotInstalledError(
            "sweep.method is optuna, and the package optuna is not installed",
            "pip install 'toolkit[optuna]', or --set sweep.method=random",
        )


def _distribution(values: tuple[Any, ...] | RangeSection) -> Any:
    """An axis as Optuna knows it: choices by their index, because they may be lists or sections."""
    from optuna import distributions

    if not isinstance(values, RangeSection):
        return distributions.CategoricalDistribution(range(len(values)))
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return distributions.FloatDistribution(float(values.low), float(values.high), log=values.log)


def _index(section: SweepSection, key: str, value: Any) -> Any:
    values = section.over[key]
    if isinstance(values, RangeSection):
        return value
    texts = [json.dumps(one, sort_keys=True) for one in values]  # 1, 1.0 and true are three
    return texts.index(json.dumps(value, sort_keys=True))


def _value(values: tuple[Any, ...] | RangeSection, asked: Any) -> Any:
    return _short(values, asked) if isinstance(values, RangeSection) else values[asked]


def ends(section: SweepSection) -> list[Assignment]:
    """Trials at the ends: all first values, then each key's others alone. What these do, others will hardly undo."""
    others = {
        key: (values.low, values.high) if isinstance(values, RangeSection) else values
        for key, values in section.over.items()
    }
    first = {key: values[0] for key, values in others.items()}
    return [first] + [first | {key: one} for key, values in others.items() for one in values[1:]]


def overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
    """A trial as ``--set`` takes it: JSON is YAML."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


def shown(values: Mapping[str, Any]) -> str:
    """A trial for people: ``train.lora.rank=8, train.learning_rate=0.0001``."""
    return ", ".join(overrides(values))
