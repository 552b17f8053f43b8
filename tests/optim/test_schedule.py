import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from megalm.optim.config import ScheduleConfig
from megalm.optim.schedule import learning_rate

PEAK = 3e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "constant"}, {0: 1.0, 5: 1.0, 100: 1.0}),
        ({"kind": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        ({"kind": "linear", "min_ratio": 0.0, "warmup_steps": 1}, {0: 1.0, 5: 0.5, 10: 0.0, 50: 0.0}),
        ({"kind": "linear", "min_ratio": 0.2, "warmup_steps": 3}, {0: 1 / 3, 2: 1.0, 6: 0.6, 10: 0.2, 11: 0.2}),
        ({"kind": "cosine", "min_ratio": 0.0}, {0: 1.0, 5: 0.5, 10: 0.0, 11: 0.0}),
        ({"kind": "cosine", "min_ratio": 0.5, "warmup_steps": 1}, {0: 1.0, 5: 0.75, 10: 0.5, 99: 0.5}),
        ({"kind": "cosine", "min_ratio": 0.1, "total_steps": 6, "warmup_steps": 2}, {3: 0.55, 5: 0.1, 10: 0.1}),
        ({"kind": "wsd", "min_ratio": 0.0, "decay_steps": 4}, {0: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 10: 0.0, 12: 0.0}),
        ({"kind": "wsd", "min_ratio": 0.1}, {8: 1.0, 9: 1.0, 10: 0.1}),
        ({"kind": "inverse_sqrt", "warmup_steps": 2, "min_ratio": 0.0}, {0: 0.5, 1: 1.0, 7: 0.5}),
        ({"kind": "inverse_sqrt", "warmup_steps": 2, "min_ratio": 0.6}, {7: 0.6}),
    ],
)
def test_table(settings, expected):
    """Eleven steps, so that the steps after the first (n = 1) to the last (n = 11) are ten equal parts."""
    config = ScheduleConfig(**settings)
    for step, ratio in expected.items():
        assert learning_rate(step, config, PEAK, 11) == pytest.approx(ratio * PEAK), step


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_a_run_of_one_step_takes_the_peak(kind):
    assert learning_rate(0, ScheduleConfig(kind=kind), PEAK, 1) == PEAK


def hugging_face(make, steps: int) -> list[float]:
    """Rates at their steps 1, 2, ...: theirs starts at 0 (a step that trains nothing), ours one later."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"kind": "constant"}, lambda o: get_constant_schedule_with_warmup(o, 7)),
        ({"kind": "linear", "min_ratio": 0.0}, lambda o: get_linear_schedule_with_warmup(o, 7, 50)),
        (
            {"kind": "cosine", "min_ratio": 0.1},
            lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 7, 50, min_lr_rate=0.1),
        ),
        (
            {"kind": "wsd", "min_ratio": 0.0, "decay_steps": 12},  # above 0, theirs would warm up from the lowest rate
            lambda o: get_wsd_schedule(o, 7, 12, num_training_steps=50, decay_type="linear"),
        ),
        ({"kind": "inverse_sqrt", "min_ratio": 0.0}, lambda o: get_inverse_sqrt_schedule(o, 7)),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_equals_hugging_face_one_step_later(settings, make):
    config = ScheduleConfig(warmup_steps=7, **settings)
    theirs = hugging_face(make, 50)
    assert [learning_rate(step, config, PEAK, 50) for step in range(50)] == pytest.approx(theirs, rel=1e-12)
    # Negative control: without the shift, warm-up alone is off by a seventh of the peak.
    assert [learning_rate(step + 1, config, PEAK, 50) for step in range(50)] != pytest.approx(theirs, rel=1e-3)


@st.composite
def schedules(draw):
    steps = draw(st.integers(2, 400))
    kind = draw(st.sampled_from(["constant", "linear", "cosine", "wsd", "inverse_sqrt"]))
    warmup = draw(st.integers(1 if kind == "inverse_sqrt" else 0, steps))
    decay = draw(st.none() | st.integers(0, steps - warmup)) if kind == "wsd" else None
    ratio = draw(st.floats(0.0, 1.0))
    return ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, min_ratio=ratio), steps


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_invariants(case):
    config, steps = case
    rates = [learning_rate(step, config, PEAK, steps) for step in range(steps + 20)]
    warmup = max(config.warmup_steps, 1)
    rising, falling = rates[:warmup], rates[warmup - 1 :]
    slack = 1e-12
    assert rates[0] > 0
    assert rising[-1] == PEAK
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False))
    assert all(a >= b - slack for a, b in zip(falling, falling[1:], strict=False))
    assert all(config.min_ratio * PEAK - slack <= rate <= PEAK + slack for rate in falling)
    assert len(set(rates[steps - 1 :])) == 1
    if config.kind in ("linear", "cosine", "wsd") and steps > warmup and config.decay_steps != 0:
        assert rates[steps - 1] == pytest.approx(config.min_ratio * PEAK, abs=1e-15)
        length = steps - warmup
        if config.kind == "wsd":
            length = min(length, max(1, steps // 10) if config.decay_steps is None else config.decay_steps)
        # No jump: a step moves at most a cosine's steepest part, pi / 2 times the mean slope.
        steepest = math.pi / 2 * (1 - config.min_ratio) * PEAK / length
        assert all(a - b <= steepest + slack for a, b in zip(falling, falling[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 11, "total_steps": 10}, "warmup_steps 11 is more than total_steps 10"),
        (
            {"kind": "wsd", "warmup_steps": 6, "decay_steps": 5, "total_steps": 10},
            r"warmup_steps 6 \+ decay_steps 5 is more than total_steps 10",
        ),
        ({"kind": "inverse_sqrt"}, "set warmup_steps above 0"),
        ({"kind": "cosine", "decay_steps": 5}, "decay_steps is of kind wsd, and kind is cosine"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)


def test_fit_names_the_key_that_is_too_small():
    with pytest.raises(ValueError, match="warmup_steps 100 is more than train.steps 20"):
        ScheduleConfig(warmup_steps=100).fit(20, "train.steps")
