"""Maps in plain loops: what convolutions, averages and the losses on them come to."""

import math
from itertools import product

Map = list[list[list[float]]]  # of one image, channel by channel


def convolution(seen: Map, kernels: list[Map], bias: list[float] | None = None) -> Map:
    """Of stride 1, with zeros around the map so that it keeps its size."""
    height, width, reach = len(seen[0]), len(seen[0][0]), len(kernels[0][0]) // 2
    made = []
    for c, kernel in enumerate(kernels):
        rows = [[0.0 if bias is None else bias[c]] * width for _ in range(height)]
        sides = range(-reach, reach + 1)
        for y, x, k, dy, dx in product(range(height), range(width), range(len(seen)), sides, sides):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                rows[y][x] += kernel[k][dy + reach][dx + reach] * seen[k][y + dy][x + dx]
        made.append(rows)
    return made


def normalized(seen: Map, norm) -> Map:
    """What a batch normalization makes of a map by its running statistics."""
    numbers = zip(
        seen,
        norm.running_mean.tolist(),
        norm.running_var.tolist(),
        norm.weight.tolist(),
        norm.bias.tolist(),
        strict=True,
    )
    return [
        [[(v - mean) / math.sqrt(var + norm.eps) * weight + bias for v in row] for row in channel]
        for channel, mean, var, weight, bias in numbers
    ]


def rectified(seen: Map) -> Map:
    return [[[max(v, 0.0) for v in row] for row in channel] for channel in seen]


def layer(seen: Map, convolved, norm, *, relu: bool) -> Map:
    made = normalized(convolution(seen, convolved.weight.tolist()), norm)
    return rectified(made) if relu else made


def averaged(seen: Map, side: int) -> Map:
    """Means over blocks; the side divides that of the map."""
    block = len(seen[0]) // side
    return [
        [
            [
                sum(
                    channel[y * block + i][x * block + j]
                    for i in range(block)
                    for j in range(block)
                )
                / block**2
                for x in range(side)
            ]
            for y in range(side)
        ]
        for channel in seen
    ]


def nearest(seen: Map, side: int) -> Map:
    old = len(seen[0])
    places = [place * old // side for place in range(side)]
    return [[[channel[y][x] for x in places] for y in places] for channel in seen]


def numbers(seen: Map) -> list[float]:
    return [v for channel in seen for row in channel for v in row]


def mean_square(first: list[Map], second: list[Map]) -> float:
    gaps = [
        (a - b) ** 2
        for one, other in zip(first, second, strict=True)
        for a, b in zip(numbers(one), numbers(other), strict=True)
    ]
    return sum(gaps) / len(gaps)


def hierarchical(student: list[Map], teacher: list[Map]) -> float:
    side, value, weight, whole = len(student[0][0]), mean_square(student, teacher), 1.0, 1.0
    for smaller in (4, 2, 1):
        if smaller < side:
            weight /= 2
            whole += weight
            value += weight * mean_square(
                [averaged(m, smaller) for m in student], [averaged(m, smaller) for m in teacher]
            )
    return value / whole


def reviewed(levels: list[Map], fusions, sides: list[int]) -> list[Map]:
    """What one image's maps, shallow to deep, become before they are compared."""
    made, deeper = [], None
    for seen, fusion, side in reversed(list(zip(levels, fusions, sides, strict=True))):
        fused = layer(seen, *fusion.enter, relu=False)
        if deeper is not None:
            deeper = nearest(deeper, len(fused[0]))
            gates = convolution(
                fused + deeper, fusion.gates.weight.tolist(), fusion.gates.bias.tolist()
            )
            gates = [[[1 / (1 + math.exp(-v)) for v in row] for row in gate] for gate in gates]
            fused = [
                [
                    [
                        gates[0][y][x] * own[y][x] + gates[1][y][x] * other[y][x]
                        for x in range(len(own))
                    ]
                    for y in range(len(own))
                ]
                for own, other in zip(fused, deeper, strict=True)
            ]
        deeper = nearest(fused, side)
        made.insert(0, layer(deeper, *fusion.leave, relu=False))
    return made
