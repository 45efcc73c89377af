"""Numbers kept between scrapes: counters, histograms, and label values with a bound on their number.

Plain Python on one thread. Knows nothing of Prometheus; `metrics.py` gives these their names.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from threading import Lock

Labels = tuple[str, ...]
OTHER = "_other"


class Histogram:
    """Counts of observations by upper bound, their sum and their number."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds a value. NaN is left out: it has no bucket and would spoil the sum for good."""
        if not math.isnan(value):
            self._counts[bisect_left(self._bounds, value)] += times
            self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations not above it), ending in ``+Inf``."""
        pairs, count = [], 0
        for bound, own in zip((*self._bounds, math.inf), self._counts, strict=True):
            count += own
            pairs.append(("+Inf" if bound == math.inf else repr(float(bound)), float(count)))
        return pairs


class Counters:
    """A number for each set of label values; only ever grows."""

    def __init__(self) -> None:
        self._values: defaultdict[Labels, float] = defaultdict(float)

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        self._values[labels] += amount

    def items(self) -> list[tuple[Labels, float]]:
        return sorted(self._values.items())


class Histograms:
    """A histogram for each set of label values."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._values: dict[Labels, Histogram] = {}

    def at(self, labels: Labels) -> Histogram:
        return self._values.setdefault(labels, Histogram(self._bounds))

    def items(self) -> list[tuple[Labels, Histogram]]:
        return sorted(self._values.items())


class RecentCounters:
    """Rows of counters for the most recent labels; rows that fall out are added to `OTHER`.

    The sum over all rows never shrinks, and there are never more than ``limit`` + 1 rows.
    """

    def __init__(self, limit: int, width: int) -> None:
        self._limit = limit
        self._width = width
        self._rows: OrderedDict[str, list[float]] = OrderedDict()
        self._other = [0.0] * width

    def add(self, label: str, amounts: tuple[float, ...]) -> None:
        """Adds one amount to each of the row's counters."""
        row = self._rows.setdefault(label, [0.0] * self._width)
        self._rows.move_to_end(label)
        _add_to(row, amounts)
        if len(self._rows) > self._limit:
            _, oldest = self._rows.popitem(last=False)
            _add_to(self._other, tuple(oldest))

    def column(self, index: int) -> Iterator[tuple[str, float]]:
        """(label, value) of one counter over all rows, `OTHER` last where it is not empty."""
        yield from ((label, row[index]) for label, row in self._rows.items())
        if any(self._other):
            yield OTHER, self._other[index]


class RecentTimes:
    """When each of the most recent keys was last touched; gives the gap between two touches."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._times: OrderedDict[str, float] = OrderedDict()

    def touch(self, key: str) -> float | None:
        """Seconds since the key's last touch, or None at its first."""
        now = self._clock()
        before = self._times.pop(key, None)
        self._times[key] = now
        if len(self._times) > self._limit:
            self._times.popitem(last=False)
        return None if before is None else now - before

    def note(self, key: str, at_s: float) -> None:
        """Sets a key's time, unless it has one."""
        self._times.setdefault(key, at_s)
        if len(self._times) > self._limit:
            self._times.popitem(last=False)

    def forget(self, key: str) -> float | None:
        """The key's last time, which is not kept any longer."""
        return self._times.pop(key, None)


def _add_to(row: list[float], amounts: tuple[float, ...]) -> None:
    for index, amount in enumerate(amounts):
        row[index] += amount


class RecentNames:
    """The name that each of the most recent digests was last asked for by. May be used from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()

    def note(self, digest: str, name: str) -> None:
        with self._lock:
            self._names[digest] = name
            self._names.move_to_end(digest)
            if len(self._names) > self._limit:
                self._names.popitem(last=False)

    def get(self, digest: str) -> str | None:
        with self._lock:
            return self._names.get(digest)
