"""Augmentation one pixel at a time, and the hash behind it in Python's whole numbers."""

WORD = 2**64


def splitmix(state: int) -> int:
    """The output of SplitMix64 whose state was this (Steele et al., OOPSLA 2014, figure 16)."""
    z = (state + 0x9E3779B97F4A7C15) % WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


def draw(seed: int, epoch: int, index: int, number: int) -> float:
    """One uniform number: the four are hashed one after the other."""
    state = splitmix((splitmix(seed) + epoch) % WORD)
    image = splitmix((state + index) % WORD)
    return (splitmix((image + number) % WORD) >> 11) / 2**53


def crop_and_flip(image, uniform, padding: int, flip: bool):
    """Image (h, w) of anything: cropped from a border of zeros, perhaps mirrored."""
    height, width = len(image), len(image[0])
    top = int(uniform[0] * (2 * padding + 1)) - padding
    left = int(uniform[1] * (2 * padding + 1)) - padding
    black = [0] * len(image[0][0])
    rows = []
    for r in range(top, top + height):
        row = [
            image[r][c] if 0 <= r < height and 0 <= c < width else black
            for c in range(left, left + width)
        ]
        rows.append(row[::-1] if flip and uniform[2] < 0.5 else row)
    return rows


def kept_by_cutmix(height: int, width: int, share: float, down: float, across: float):
    """Which pixels stay, (h, w) of True and False: formula (2) of CutMix, half to each side.

    Where that is less than half of them, the box is what stays.
    """
    half = [int(side * (1 - share) ** 0.5 / 2) for side in (height, width)]
    middle = int(down * height), int(across * width)
    inside = [
        [
            middle[0] - half[0] <= r < middle[0] + half[0]
            and middle[1] - half[1] <= c < middle[1] + half[1]
            for c in range(width)
        ]
        for r in range(height)
    ]
    covered = sum(map(sum, inside))
    swap = 2 * covered > height * width
    return [[pixel == swap for pixel in row] for row in inside]


def erased(image, down: float, across: float):
    """Image (h, w) with zeros in a square of half its height around a middle."""
    height, width = len(image), len(image[0])
    r0, c0, half = int(down * height), int(across * width), height // 4
    return [
        [
            0 if r0 - half <= r < r0 + half and c0 - half <= c < c0 + half else image[r][c]
            for c in range(width)
        ]
        for r in range(height)
    ]
