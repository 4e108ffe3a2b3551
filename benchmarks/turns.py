"""Times several ways to do the same in turn, so that a machine that changes its speed is fair."""

import statistics
import time
from collections.abc import Callable, Mapping


def in_turn(
    ways: Mapping[str, Callable[[], object]], *, rounds: int, unit: str
) -> dict[str, tuple[float, float, float]]:
    """Prints the median and least time of each way, and its median ratio to the first.

    Args:
        ways: Name -> what to time; the first is what the others are compared with. A way that
            returns a float has timed itself, in seconds.
        rounds: How often each is timed, after one call that is not.
        unit: What one call is, for the heading.

    Returns:
        What was printed, name -> (median, least, ratio), in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for _ in range(rounds):
        for name, work in ways.items():
            start = time.perf_counter()
            timed = work()
            own = time.perf_counter() - start
            seconds[name].append(timed if isinstance(timed, float) else own)
    first = next(iter(seconds.values()))
    print(f"{'':32} {'median':>10} {'least':>10}   first / this   ({unit}, {rounds} rounds)")
    found = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, times, strict=True))
        median, least = statistics.median(times), min(times)
        print(f"{name:32} {_pretty(median):>10} {_pretty(least):>10}   {ratio:12.3f}", flush=True)
        found[name] = median, least, ratio
    return found


def _pretty(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
