"""The losses on feature maps, written out for lists of numbers: maps are [image][channel][y][x]."""

import math

Map = list[list[list[list[float]]]]


def pooled(maps: Map, height: int, width: int, reduce=lambda cell: sum(cell) / len(cell)) -> Map:
    """Reduces the cells of a regular grid; sizes must divide."""

    def cell(channel, y, x):
        tall, wide = len(channel) // height, len(channel[0]) // width
        return [channel[y * tall + dy][x * wide + dx] for dy in range(tall) for dx in range(wide)]

    return [
        [
            [[reduce(cell(channel, y, x)) for x in range(width)] for y in range(height)]
            for channel in image
        ]
        for image in maps
    ]


def to_smaller(first: Map, second: Map, **options) -> tuple[Map, Map]:
    height = min(len(first[0][0]), len(second[0][0]))
    width = min(len(first[0][0][0]), len(second[0][0][0]))
    return pooled(first, height, width, **options), pooled(second, height, width, **options)


def flat(nested) -> list[float]:
    if not isinstance(nested, list):
        return [nested]
    return [value for part in nested for value in flat(part)]


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector] if length > 0 else vector


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def energy(image) -> list[float]:
    """The mean over channels of the square, at every position."""
    channels = [flat(channel) for channel in image]
    return [sum(c[p] ** 2 for c in channels) / len(channels) for p in range(len(channels[0]))]


def attention_transfer(student: Map, teacher: Map, paper: bool = False) -> float:
    total, entries = 0.0, 0
    for s, t in zip(*to_smaller(student, teacher), strict=True):
        gaps = [a - b for a, b in zip(unit(energy(s)), unit(energy(t)), strict=True)]
        squares = sum(g * g for g in gaps)
        total += math.sqrt(squares) if paper else squares
        entries += 1 if paper else len(gaps)
    return total / entries


def neuron_selectivity(student: Map, teacher: Map) -> float:
    def kernel(a, b):
        return sum(dot(x, y) ** 2 for x in a for y in b) / (len(a) * len(b))

    total = 0.0
    for s, t in zip(*to_smaller(student, teacher), strict=True):
        s, t = ([unit(flat(channel)) for channel in image] for image in (s, t))
        total += kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    return total / len(student)


def fsp_matrix(shallow, deep) -> list[list[float]]:
    """Of one image; both maps have the same size already."""
    return [[dot(flat(a), flat(b)) / len(flat(a)) for b in deep] for a in shallow]


def fsp(student: list[Map], teacher: list[Map], maximum: bool = False) -> float:
    reduce = {"reduce": max} if maximum else {}
    total = 0.0
    for stage in range(len(student) - 1):
        gaps = []
        pairs = [to_smaller(maps[stage], maps[stage + 1], **reduce) for maps in (student, teacher)]
        for image in range(len(student[0])):
            own, aim = (fsp_matrix(low[image], high[image]) for low, high in pairs)
            gaps += [a - b for a, b in zip(flat(own), flat(aim), strict=True)]
        total += sum(g * g for g in gaps) / len(gaps)
    return total


def activation_boundaries(student: list[Map], teacher: list[Map], margin: float = 1.0) -> float:
    total = 0.0
    for stage, (own, aim) in enumerate(zip(student, teacher, strict=True), 1):
        for s, t in zip(flat(own), flat(aim), strict=True):
            if t <= 0 and s > -margin:
                total += 2 ** (stage - len(student)) * (s + margin) ** 2
            if t > 0 and s <= margin:
                total += 2 ** (stage - len(student)) * (s - margin) ** 2
    return total / len(student[0])


def overhaul(student: list[Map], teacher: list[Map], margins: list[list[float]]) -> float:
    total = 0.0
    for stage, (own, aim) in enumerate(zip(student, teacher, strict=True), 1):
        for image, target in zip(own, aim, strict=True):
            for s_channel, t_channel, m in zip(image, target, margins[stage - 1], strict=True):
                for s, t in zip(flat(s_channel), flat(t_channel), strict=True):
                    cut = max(t, m)
                    if s > cut or t > 0:
                        total += 2.0 ** (stage - len(student)) * (s - cut) ** 2
    return total / len(student[0])


def factor_transfer(student: Map, teacher: Map, whole: bool = False) -> float:
    total, entries = 0.0, 0
    for s, t in zip(*to_smaller(student, teacher), strict=True):
        own, aim = (unit(flat(image) if whole else energy(image)) for image in (s, t))
        total += sum(abs(a - b) for a, b in zip(own, aim, strict=True))
        entries += len(own)
    return total / entries


def convolved(maps: Map, kernel, bias: list[float] | None = None, padding: int = 0) -> Map:
    """A convolution of stride 1; the kernel is [out][in][dy][dx]."""
    made = []
    for image in maps:
        height, width = len(image[0]), len(image[0][0])
        tall, wide = len(kernel[0][0]), len(kernel[0][0][0])

        def at(c, y, x, image=image, height=height, width=width):
            return image[c][y][x] if 0 <= y < height and 0 <= x < width else 0.0

        made.append(
            [
                [
                    [
                        (bias[out] if bias else 0.0)
                        + sum(
                            kernel[out][c][dy][dx] * at(c, y + dy - padding, x + dx - padding)
                            for c in range(len(image))
                            for dy in range(tall)
                            for dx in range(wide)
                        )
                        for x in range(width + 2 * padding - wide + 1)
                    ]
                    for y in range(height + 2 * padding - tall + 1)
                ]
                for out in range(len(kernel))
            ]
        )
    return made


def each(maps: Map, function) -> Map:
    """Applies function(value, channel) everywhere."""
    return [
        [[[function(v, c) for v in row] for row in channel] for c, channel in enumerate(image)]
        for image in maps
    ]


def normalized(maps: Map, mean, variance, weight, bias) -> Map:
    """A batch normalization that knows its statistics, with eps 1e-5."""
    return each(
        maps, lambda v, c: (v - mean[c]) / math.sqrt(variance[c] + 1e-5) * weight[c] + bias[c]
    )
