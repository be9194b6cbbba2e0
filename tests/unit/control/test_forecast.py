"""The forecast: what it learns, and that what it promises is kept as often as it says."""

from __future__ import annotations

import random

import pytest

from understudy.runtime.control.forecast import (
    COVERAGE,
    ENOUGH,
    Course,
    Forecast,
    Load,
    Promise,
)

IDLE = Load(num_places=8, num_running=0, num_ahead=0)


def course(prompt: int = 100, output: int = 50, beside: int = 1, **fields: float) -> Course:
    times = {"prefill_s": 0.001 * prompt, "decode_s": 0.02 * (output - 1)} | fields
    return Course(
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        num_beside=beside,
        had_to_wait=False,
        **times,
    )


def learned(count: int = ENOUGH) -> Forecast:
    forecast = Forecast()
    for _ in range(count):
        forecast.learn(course())
    return forecast


def test_who_has_learnt_nothing_says_nothing() -> None:
    forecast = Forecast()
    assert forecast.forecast(num_prompt_tokens=1, max_tokens=1, load=IDLE) is None
    assert forecast.promise(Promise(1.0, 2.0)) is None
    forecast.learn(course(output=1))
    assert forecast.forecast(num_prompt_tokens=1, max_tokens=1, load=IDLE) is None


def test_prompt_and_answer_take_their_time() -> None:
    told = learned().forecast(num_prompt_tokens=200, max_tokens=30, load=IDLE)
    assert told is not None
    assert told.first_token_s == pytest.approx(0.2)
    assert told.finish_s == pytest.approx(0.2 + 30 * 0.02)


def test_an_answer_is_not_longer_than_answers_are() -> None:
    told = learned().forecast(num_prompt_tokens=200, max_tokens=100_000, load=IDLE)
    assert told is not None
    assert told.finish_s == pytest.approx(0.2 + 50 * 0.02)


def test_who_comes_to_a_full_house_waits_for_those_before() -> None:
    forecast = learned()
    place_s = 0.1 + 49 * 0.02
    first = []
    for running, ahead in ((7, 0), (8, 0), (8, 7), (16, 16)):
        load = Load(num_places=8, num_running=running, num_ahead=ahead)
        told = forecast.forecast(num_prompt_tokens=100, max_tokens=10, load=load)
        assert told is not None
        first.append(told.first_token_s)
    waits = [one - 0.1 for one in first]
    assert waits == pytest.approx([0.0, place_s / 8, place_s, 25 * place_s / 8])


def test_a_crowd_makes_tokens_slower() -> None:
    forecast = learned()
    for _ in range(50):
        forecast.learn(course(beside=8, decode_s=49 * 0.1))
    for running, token_s in ((0, 0.02), (6, 0.1), (7, 0.1)):
        load = Load(num_places=8, num_running=running, num_ahead=0)
        told = forecast.forecast(num_prompt_tokens=0, max_tokens=10, load=load)
        assert told is not None
        assert told.finish_s - told.first_token_s == pytest.approx(10 * token_s)


def test_a_promise_is_kept_as_often_as_it_says_whatever_the_forecast_is_worth() -> None:
    draw = random.Random(1)
    forecast = Forecast()
    kept = made = 0
    for number in range(3000):
        rough = Promise(draw.uniform(0.1, 1.0), draw.uniform(1.0, 5.0))
        promise = forecast.promise(rough)
        actual_s = rough.finish_s * draw.lognormvariate(0.5, 0.6)
        if number >= ENOUGH:
            assert promise is not None
            made += 1
            kept += actual_s <= promise.finish_s
        forecast.judge(rough, first_token_s=rough.first_token_s, finish_s=actual_s)
    assert kept / made >= COVERAGE - 0.01
    assert kept / made < 1.0
