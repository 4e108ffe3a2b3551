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
