"""What a search tries next: the same after an interruption, inside the space, and better than chance."""

from __future__ import annotations

import json
import logging
import math
from typing import Any, Literal

import pytest

from manyshot.errors import MissingExtraError
from manyshot.tune_sampler import Tried, importances, require_optuna, suggest
from manyshot.tune_space import Dimension, Settings

SPACE = (
    Dimension("temperature", low=0.1, high=10.0, log=True),
    Dimension("agreement", low=1, high=3, whole=True),
    Dimension("steps", choices=([1.0, 2.0], None, True)),
    Dimension("threshold", low=0.0, high=1.0, step=0.1),
)


def loss(settings: Settings) -> float:
    """Best at temperature 1, agreement 2, no steps."""
    return abs(math.log(settings["temperature"])) + abs(settings["agreement"] - 2) + (settings["steps"] is not None)


def go_on(tried: list[Tried], count: int, sampler: Literal["tpe", "random"] = "tpe") -> list[Tried]:
    """A search of `count` trials, of which some are done; every seventh fails."""
    tried = list(tried)
    while len(tried) < count:
        number = len(tried)
        settings = suggest(SPACE, tried, sampler=sampler, maximize=False, num_trials=count, seed=2**62 + number)
        assert settings is not None
        tried.append(Tried(settings, None if number % 7 == 6 else loss(settings)))
    return tried


def reread(tried: list[Tried]) -> list[Tried]:
    return [Tried(json.loads(json.dumps(one.settings)), one.value) for one in tried]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_goes_on_from_its_journal_tries_what_it_would_have_tried(sampler: Any) -> None:
    whole = go_on([], 12, sampler)
    for done in (1, 9):
        assert reread(go_on(reread(whole[:done]), 12, sampler)) == reread(whole)


def test_suggestions_lie_in_the_space() -> None:
    for one in go_on([], 12):
        assert all(dimension.holds(one.settings[dimension.name]) for dimension in SPACE), one
        assert isinstance(one.settings["agreement"], int)
    assert not SPACE[1].holds(2.5)
    assert not SPACE[3].holds(0.25)
    assert not SPACE[0].holds(11)
    assert not SPACE[0].holds("auto")


def test_tpe_learns_from_what_was_tried() -> None:
    assert min(loss(one.settings) for one in go_on([], 30)[10:]) < 0.35


def test_a_grid_is_tried_in_order_until_it_ends_and_what_was_tried_is_left_out() -> None:
    space = (Dimension("mask", choices=(True, False)), Dimension("scaling", choices=(1, 2)))
    options: dict[str, Any] = {"sampler": "grid", "maximize": False, "num_trials": 4, "seed": 0}
    tried = [Tried({"mask": True, "scaling": 2.0}, 1.0)]
    for expected in ({"mask": True, "scaling": 1}, {"mask": False, "scaling": 1}, {"mask": False, "scaling": 2}):
        assert suggest(space, tried, **options) == expected
        tried.append(Tried(expected, None))
    assert suggest(space, tried, **options) is None


def test_importances_name_what_matters_and_say_nothing_of_few_trials() -> None:
    space = SPACE[:1] + SPACE[3:]
    tried = [Tried({"temperature": 10 ** (i % 5 / 2 - 1), "threshold": (i // 5) / 10}, float(i % 5)) for i in range(25)]
    found = importances(space, tried, maximize=False)
    assert list(found) == ["temperature", "threshold"]
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["temperature"] > 0.8
    assert importances(space, tried[:9], maximize=False) == {}
    assert importances(space, [Tried(one.settings, 1.0) for one in tried], maximize=False) == {}


def test_optunas_log_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.INFO)
    go_on([], 2)
    assert logging.getLogger("optuna").level == optuna.logging.INFO
    assert capfd.readouterr().err == ""


def test_a_missing_optuna_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyshot.tune_sampler.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'manyshot\[tune\]'"):
        require_optuna()
