"""Lists of seeds as text."""

from __future__ import annotations

from collections import Counter

MOST_SEEDS = 10_000
LARGEST = 2**32 - 1  # of NumPy's generators


def read_seeds(text: str) -> tuple[int, ...]:
    """Reads seeds such as ``0,1,2`` or ``0-2,7``.

    Raises:
        ValueError: If the text has another form, a range is empty, a seed appears twice or there
            are more than 10,000.

    Examples:
        >>> read_seeds("0-2,7")
        (0, 1, 2, 7)
    """
    ranges: list[range] = []
    for part in text.split(","):
        first, _, last = (bound.strip() for bound in part.partition("-"))
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ValueError(f"expected numbers such as 0,1,2 or 0-2, got {text!r}")
        ranges.append(range(int(first), int(last or first) + 1))
        if not ranges[-1]:
            raise ValueError(f"{part!r} is empty; give the smaller number first")
    if sum(each.stop - each.start for each in ranges) > MOST_SEEDS:
        raise ValueError(f"expected at most {MOST_SEEDS:,} numbers, got {text!r}")
    return distinct(tuple(seed for each in ranges for seed in each))


def distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the seeds.

    Raises:
        ValueError: If there is none, one appears twice or one has more than 32 bits.
    """
    if not seeds:
        raise ValueError("at least one seed is needed")
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise ValueError(f"seed {twice[0]} appears twice")
    if max(seeds) > LARGEST:
        raise ValueError(f"seeds are at most {LARGEST:,}, got {max(seeds)}")
    return seeds
