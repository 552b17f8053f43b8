import math

import psutil
import pytest

from megalm.metrics.meters import Rate, format_bytes, format_count, format_duration, resident_memory


def test_rate_forgets_what_left_the_window():
    now = [0.0]
    rate = Rate(window=3, clock=lambda: now[0])
    assert math.isnan(rate.per_second())
    for seconds in (100.0, 1.0, 1.0):  # the first step is slow
        now[0] += seconds
        rate.add(10)
    assert rate.per_second() == pytest.approx(30 / 102)
    now[0] += 1.0
    rate.add(10)
    assert rate.per_second() == pytest.approx(10.0)


def test_resident_memory_is_the_peak_in_bytes():
    now = psutil.Process().memory_info().rss
    assert now - 2**22 <= resident_memory() < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (7500, "2h 05m"),
        (4 * 86400 + 3 * 3600, "4d 03h"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00K"),
        (1234, "1.23K"),
        (9_996, "10.0K"),
        (45_600_000, "45.6M"),
        (789_000_000_000, "789B"),
        (15.1e12, "15.1T"),
        (2e18, "2000000T"),
        (math.nan, "-"),
    ],
)
def test_format_count(value, text):
    assert format_count(value) == text


def test_format_bytes():
    assert format_bytes(512 * 2**20) == "512 MiB"
    assert format_bytes(1.3 * 2**30) == "1.3 GiB"
