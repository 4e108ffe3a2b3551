"""Persistence of dimension 0, its images and its vectors, written out."""

import math

Bars = list[tuple[float, float]]  # (birth, death)


def kruskal(points: list[list[float]]) -> list[tuple[float, int, int]]:
    """The spanning tree of one cloud that is least in the order (length, i, j): length, i < j."""
    n = len(points)
    edges = sorted(
        (math.dist(points[i], points[j]), i, j) for i in range(n) for j in range(i + 1, n)
    )
    component = list(range(n))
    tree = []
    for length, i, j in edges:
        if component[i] != component[j]:
            tree.append((length, i, j))
            old, new = component[i], component[j]
            component = [new if c == old else c for c in component]
    return tree


def deaths(points: list[list[float]]) -> list[float]:
    return [length for length, _, _ in kruskal(points)]


def quantile(values: list[float], share: float) -> float:
    """Interpolates linearly between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def nodes(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def image(bars: Bars, births, persistences, sigma: float, scale: float, resolution: int):
    """TopKD's image in GUDHI's convention: rows are persistence, flattened row by row."""
    pixels = []
    for y in nodes(*persistences, resolution):
        for x in nodes(*births, resolution):
            total = 0.0
            for birth, death in bars:
                p = death - birth
                weight = 10 * math.tanh(p) + 10 * math.log(100 * birth + 1)
                square = (x - birth) ** 2 + (y - p) ** 2
                total += weight * math.exp(-square / (2 * sigma**2)) / (2 * math.pi * sigma**2)
            pixels.append(total / scale)
    return pixels


def fit_image(diagrams: list[Bars], resolution: int = 20) -> dict:
    """The parameters that TopKD's authors choose; GUDHI reports no bar of length zero to them."""
    points = [(b, d - b) for bars in diagrams for b, d in bars if d > b]
    first = points[:200]
    gaps = [math.dist(first[i], first[j]) for i in range(len(first)) for j in range(i)]
    sigma = quantile([gap for gap in gaps if gap > 1e-5], 0.2)
    births = min(b for b, _ in points), max(b for b, _ in points)
    persistences = min(p for _, p in points), max(p for _, p in points)
    greatest = max(
        max(image(bars, births, persistences, sigma, 1.0, resolution)) for bars in diagrams
    )
    return {"births": births, "persistences": persistences, "sigma": sigma, "scale": greatest}


def normal(z: float) -> float:
    """The normal distribution function."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def vector(lengths: list[float], persistences, sigma: float, scale: float, resolution: int):
    """The smoothed histogram of lengths in units of their mean, each weighted by itself."""
    mean = sum(lengths) / len(lengths)
    relative = [length / mean for length in lengths]
    edges = nodes(*persistences, resolution + 1)
    return [
        sum(p * (normal((high - p) / sigma) - normal((low - p) / sigma)) for p in relative) / scale
        for low, high in zip(edges, edges[1:], strict=False)
    ]


def fit_vector(diagrams: list[list[float]], resolution: int = 20) -> dict:
    """From 0 to three cells beyond the greatest relative death; one cell is the width."""
    greatest = max(length / (sum(d) / len(d)) for d in diagrams for length in d)
    cell = greatest / (resolution - 3)
    ends = (0.0, resolution * cell)
    top = max(max(vector(d, ends, cell, 1.0, resolution)) for d in diagrams)
    return {"persistences": ends, "sigma": cell, "scale": top}
