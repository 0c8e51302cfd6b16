# SPDX-License-Identifier: MIT
"""The paired timer, on a clock that the test itself turns."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from fastconv import _timing
from fastconv._timing import Quartiles, Result, compare


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a peer moves it: clock.peer(name, seconds) makes one."""

    class Clock:
        now = 0.0
        calls: list = []  # (name, time at the start), in order

        def peer(self, name, seconds):
            def call():
                assert not gc.isenabled()
                self.calls.append((name, self.now))
                self.now += seconds() if callable(seconds) else seconds

            return call

        def turns(self):
            """The peers' names with repetitions in a row removed."""
            names = [name for name, _ in self.calls]
            return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]

    clock = Clock()
    clock.calls = []
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_times_and_ratios(clock):
    result = compare({"a": clock.peer("a", 0.001), "b": clock.peer("b", 0.004)}, seconds=2)
    assert result.time("a").median == pytest.approx(0.001)
    assert result.time("b").median == pytest.approx(0.004)
    assert result.ratio("a", "b").median == pytest.approx(4)
    assert result.ratio("b", "a").high == pytest.approx(0.25)


def test_peers_take_turns_within_the_time(clock):
    compare(
        {"a": clock.peer("a", 0.001), "b": clock.peer("b", 0.004), "c": clock.peer("c", 0.002)}, seconds=2
    )
    turns = clock.turns()
    assert turns == ["a", "b", "c"] * (len(turns) // 3)
    # Warm-up and calibration come first; a turn is 50 ms that are dropped and a sample of 20 ms.
    assert len(turns) // 3 - 1 == pytest.approx(2 / (3 * 0.07), abs=1.5)
    assert clock.now < 2 + 2 * 3 * 0.08


def test_a_sample_is_long_enough(clock, monkeypatch):
    lengths = []
    timed = _timing._cpu_time

    def spy(function, calls):
        seconds = timed(function, calls)
        if calls > 1:
            lengths.append(seconds)
        return seconds

    monkeypatch.setattr(_timing, "_cpu_time", spy)
    compare({"a": clock.peer("a", 0.0007)}, seconds=1)
    assert lengths and all(0.02 <= seconds < 0.021 for seconds in lengths)


def test_the_first_50_ms_of_a_turn_are_dropped(clock):
    """A peer that is slow for 45 ms after the other has worked looks as fast as it is afterwards."""
    last = {"name": None, "since": 0.0}

    def speed(name):
        def seconds():
            if last["name"] != name:
                last.update(name=name, since=clock.now)
            return 0.005 if clock.now - last["since"] < 0.045 else 0.001

        return seconds

    result = compare({name: clock.peer(name, speed(name)) for name in "ab"}, seconds=2)
    assert result.time("a").high == pytest.approx(0.001)
    assert result.time("b").high == pytest.approx(0.001)


def test_drift_leaves_ratios_alone(clock):
    """Everything gets slower as time passes; pair by pair, b still takes twice as long as a."""
    slow = lambda: 1 + clock.now  # noqa: E731
    peers = {"a": clock.peer("a", lambda: 0.001 * slow()), "b": clock.peer("b", lambda: 0.002 * slow())}
    result = compare(peers, seconds=4)
    assert result.time("a").high > 1.5 * result.time("a").low
    assert result.ratio("a", "b").low == pytest.approx(2, rel=0.1)
    assert result.ratio("a", "b").high == pytest.approx(2, rel=0.1)


def test_a_slow_peer_still_gets_three_turns(clock):
    result = compare({"a": clock.peer("a", 10.0), "b": clock.peer("b", 0.001)}, seconds=0.1)
    assert [len(samples) for samples in result.samples.values()] == [3, 3]
    assert result.time("a").median == pytest.approx(10)


def test_a_peer_too_fast_for_the_clock(clock, monkeypatch):
    """Its calls seem to take no time at all; their number stays bounded."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(ticks) // 1000 * 0.01)
    result = compare({"a": lambda: None}, seconds=0.1)
    assert len(result.samples["a"]) >= 3


def test_garbage_collection_returns_after_an_error():
    def fail():
        raise RuntimeError("peer")

    with pytest.raises(RuntimeError, match="peer"):
        compare({"a": fail})
    assert gc.isenabled()


@pytest.mark.parametrize(
    "peers, seconds, named", [({}, 1, "peers"), ({"a": print}, 0, "0"), ({"a": print}, -2, "-2")]
)
def test_bad_arguments(peers, seconds, named):
    with pytest.raises(ValueError, match=named):
        compare(peers, seconds=seconds)


def test_quartiles():
    five = Quartiles.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert five == Quartiles(median=3.0, low=2.0, high=4.0, count=5)
    assert five.inverted(12.0) == Quartiles(median=4.0, low=3.0, high=6.0, count=5)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0, 1)


def test_ratios_go_pair_by_pair():
    result = Result({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    assert result.ratio("a", "b") == Quartiles(2.0, 2.0, 2.0, 3)
    with pytest.raises(ValueError):
        Result({"a": [1.0, 2.0], "b": [1.0]}).ratio("a", "b")


def test_what_is_between_calls_is_not_timed(clock, monkeypatch):
    """With events that read the clock: a flush of 3 ms before each call of 1 ms leaves 1 ms."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    peers = {"a": clock.peer("a", 0.001), "b": clock.peer("b", 0.002)}
    flushed = compare(peers, seconds=2, device="cuda", between=clock.peer("flush", 0.003))
    assert flushed.time("a").median == pytest.approx(0.001)
    assert flushed.ratio("a", "b").median == pytest.approx(2)
    assert [name for name, _ in clock.calls[::2]] == ["flush"] * (len(clock.calls) // 2)
    with pytest.raises(ValueError, match="between"):
        compare(peers, between=print)


@pytest.mark.gpu
def test_a_flushed_cache_is_slower():
    """Half of what the L2 cache holds is read again and again; only without a flush it stays there."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.device import flush, kernel_seconds

    device = torch.device("cuda")
    size = torch.cuda.get_device_properties(device).L2_cache_size // 2
    data = torch.ones(size // 4, device=device)
    warm = compare({"sum": data.sum}, seconds=0.3, device=device)
    cold = compare({"sum": data.sum}, seconds=0.3, device=device, between=flush(device, size))
    assert cold.time("sum").median > 1.1 * warm.time("sum").median
    assert flush(device, 4 * size) is None
    assert 0 < kernel_seconds(data.sum, device) < 2 * cold.time("sum").median


@pytest.mark.gpu
def test_cuda_events_see_the_work_of_the_gpu():
    """A product of 4096x4096 matrices returns at once, but is timed by what the GPU does."""
    large, small = (torch.rand(n, n, device="cuda") for n in (4096, 64))
    result = compare(
        {"large": lambda: large @ large, "small": lambda: small @ small}, seconds=0.5, device="cuda"
    )
    assert result.ratio("small", "large").low > 2
