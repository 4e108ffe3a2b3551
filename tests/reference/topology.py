"""Persistence of dimension 0, and what is made of diagrams of any, written out."""

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


def weight_of(name: str, b: float, p: float) -> float:
    if name == "topkd":
        return 10 * math.tanh(p) + 10 * math.log(100 * b + 1)
    return {"persistence": p, "one": 1.0}[name]


def scale_of(name: str, deaths: list[float]) -> float:
    """The statistic by which births and deaths are divided."""
    if name == "none":
        return 1.0
    ordered, n = sorted(deaths), len(deaths)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    statistics = {"mean": sum(deaths) / n, "median": middle, "max": ordered[-1]}
    return statistics[name.removeprefix("tree_").removeprefix("death_")]


def image(
    bars: Bars,
    births,
    persistences,
    sigma: float,
    normalizer: float,
    resolution: int,
    sampling: str = "density",
    weight: str = "topkd",
    scale: str = "none",
    detach_scale: bool = False,
):
    """Rows are persistence, flattened row by row. By default TopKD's image, as GUDHI has it."""
    length = scale_of(scale, [death for _, death in bars])
    points = [(birth / length, (death - birth) / length) for birth, death in bars]

    def density(z):
        return math.exp(-(z**2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)

    def along(ends, value):
        if sampling == "density":
            return [density(node - value) for node in nodes(*ends, resolution)]
        below = [normal((edge - value) / sigma) for edge in nodes(*ends, resolution + 1)]
        return [high - low for low, high in zip(below, below[1:], strict=False)]

    pixels = [0.0] * resolution**2
    for b, p in points:
        rows, columns = along(persistences, p), along(births, b)
        for r in range(resolution):
            for c in range(resolution):
                pixels[r * resolution + c] += (
                    weight_of(weight, b, p) * rows[r] * columns[c] / normalizer
                )
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
    return {"births": births, "persistences": persistences, "sigma": sigma, "normalizer": greatest}


def normal(z: float) -> float:
    """The normal distribution function."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def vector(
    lengths: list[float],
    persistences,
    sigma: float,
    normalizer: float,
    resolution: int,
    weight: str = "persistence",
    scale: str = "death_mean",
    detach_scale: bool = False,
):
    """The smoothed histogram of lengths in units of their mean, each weighted by itself."""
    length = scale_of(scale, lengths)
    relative = [p / length for p in lengths]
    edges = nodes(*persistences, resolution + 1)
    return [
        sum(
            weight_of(weight, 0.0, p) * (normal((high - p) / sigma) - normal((low - p) / sigma))
            for p in relative
        )
        / normalizer
        for low, high in zip(edges, edges[1:], strict=False)
    ]


def fit_vector(diagrams: list[list[float]], resolution: int = 20) -> dict:
    """From 0 to three cells beyond the greatest relative death; one cell is the width."""
    greatest = max(length / (sum(d) / len(d)) for d in diagrams for length in d)
    cell = greatest / (resolution - 3)
    ends = (0.0, resolution * cell)
    top = max(max(vector(d, ends, cell, 1.0, resolution)) for d in diagrams)
    return {"persistences": ends, "sigma": cell, "normalizer": top}


def betti(bars: Bars, t: float, sigma: float = 0.0) -> float:
    if sigma == 0:
        return sum(b <= t < d for b, d in bars)
    return sum(normal((t - b) / sigma) - normal((t - d) / sigma) for b, d in bars)


def tents(bars: Bars, t: float) -> list[float]:
    return [max(0.0, min(t - b, d - t)) for b, d in bars]


def landscape(bars: Bars, t: float, layer: int) -> float:
    """The first layer is layer 0."""
    ordered = sorted(tents(bars, t), reverse=True)
    return ordered[layer] if layer < len(ordered) else 0.0


def silhouette(bars: Bars, t: float, power: float) -> float:
    weights = [(d - b) ** power for b, d in bars]
    return sum(w * tent for w, tent in zip(weights, tents(bars, t), strict=True)) / sum(weights)


def entropy_terms(bars: Bars) -> list[float]:
    total = sum(d - b for b, d in bars)
    return [-(d - b) / total * math.log((d - b) / total) for b, d in bars]


def entropy_curve(bars: Bars, t: float) -> float:
    terms = zip(entropy_terms(bars), bars, strict=True)
    return sum(term for term, (b, d) in terms if b <= t < d)
