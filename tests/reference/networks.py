"""The networks of the public benchmark as facts, and again as plain functions of their weights."""

import re

import torch
import torch.nn.functional as F

# Name -> parameters with 100 classes (None: not published; `mobilenetv1`: with 1000), then the maps
# (channels, side) for images of 32x32 (`mobilenetv1`: of 224x224), then the width of the embedding.
THIN = [(16, 32), (16, 32), (32, 16), (64, 8)]
WIDE = [(32, 32), (64, 32), (128, 16), (256, 8)]
TWICE = [(16, 32), (32, 32), (64, 16), (128, 8)]
PLAIN = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]
NETWORKS = {
    "resnet8x0.25": (None, [(4, 32), (4, 32), (8, 16), (16, 8)], 16),
    "resnet8": (83_892, THIN, 64),
    "resnet14": (181_108, THIN, 64),
    "resnet20": (278_324, THIN, 64),
    "resnet32": (472_756, THIN, 64),
    "resnet44": (667_188, THIN, 64),
    "resnet56": (861_620, THIN, 64),
    "resnet110": (1_736_564, THIN, 64),
    "resnet8x4": (1_233_540, WIDE, 256),
    "resnet32x4": (7_433_860, WIDE, 256),
    "resnet50": (23_705_252, [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
    "wrn_16_1": (180_916, THIN, 64),
    "wrn_16_2": (703_284, TWICE, 128),
    "wrn_40_1": (569_780, THIN, 64),
    "wrn_40_2": (2_255_156, TWICE, 128),
    "vgg8": (3_965_028, PLAIN, 512),
    "vgg11": (9_277_284, PLAIN, 512),
    "vgg13": (9_462_180, PLAIN, 512),
    "vgg16": (14_774_436, PLAIN, 512),
    "vgg19": (20_086_692, PLAIN, 512),
    "mobilenetv2": (812_836, [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "mobilenetv2_1_0": (None, [(32, 16), (24, 16), (32, 8), (96, 4), (320, 2)], 1280),
    "shufflev1": (949_258, [(24, 32), (240, 16), (480, 8), (960, 4)], 960),
    "shufflev2": (1_355_528, [(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
    "shufflev2_1_5": (None, [(24, 32), (176, 16), (352, 8), (704, 4)], 1024),
    "mobilenetv1": (4_231_976, [(32, 112), (128, 56), (256, 28), (512, 14), (1024, 7)], 1024),
}
FAMILIES = ("resnet8", "resnet50", "wrn_16_2", "vgg8", "mobilenetv2", "shufflev1", "shufflev2")
FAMILIES += ("mobilenetv1",)


def family(name):
    if name in ("resnet50", "mobilenetv1", "shufflev1"):
        return name
    return re.match(r"resnet|wrn|vgg|mobilenetv2|shufflev2", name)[0]


# --- Names of weights ----------------------------------------------------------------------------

MODULES = {  # family -> names of all modules with weights, as published weights have them
    "resnet": r"conv1|bn1|fc|layer[1-3]\.\d+\.(conv[12]|bn[12]|downsample\.[01])",
    "resnet50": r"conv1|bn1|linear|layer[1-4]\.\d\.(conv[123]|bn[123]|shortcut\.[01])",
    "wrn": r"conv1|bn1|fc|block[1-3]\.layer\.\d\.(bn[12]|conv[12]|convShortcut)",
    "vgg": r"classifier|block[0-4]\.([0369]|1|4|7|10)",
    "mobilenetv2": r"conv[12]\.[01]|blocks\.[0-6]\.\d\.conv\.[013467]|classifier\.0",
    "shufflev1": r"conv1|bn1|linear|layer[1-3]\.\d\.(conv|bn)[1-3]",
    "shufflev2": r"(conv|bn)[12]|linear|layer[1-3]\.(0\.(conv|bn)[1-5]|[1-7]\.(conv|bn)[1-3])",
    "mobilenetv1": r"model\.0\.[01]|model\.\d+\.[0134]|fc",
}
TENSORS = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def keys(convolutions, norms, head, bias=False):
    ends = ("weight", "bias") if bias else ("weight",)
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return (
        {f"{name}.{end}" for name in convolutions for end in ends}
        | {f"{name}.{end}" for name in norms for end in statistics}
        | {f"{head}.weight", f"{head}.bias"}
    )


def _blocks(pattern, stages, blocks, numbers):
    return [
        pattern.format(s, b, k)
        for s, count in zip(stages, blocks, strict=True)
        for b in range(count)
        for k in numbers
    ]


_MOBILE = [
    f"blocks.{s}.{b}.conv.{{}}" for s, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(n)
]
KEYS = {  # all names of a few networks, without a pattern
    "resnet8": keys(
        ["conv1", *_blocks("layer{}.{}.conv{}", (1, 2, 3), (1, 1, 1), (1, 2))]
        + ["layer2.0.downsample.0", "layer3.0.downsample.0"],
        ["bn1", *_blocks("layer{}.{}.bn{}", (1, 2, 3), (1, 1, 1), (1, 2))]
        + ["layer2.0.downsample.1", "layer3.0.downsample.1"],
        "fc",
    ),
    "resnet50": keys(
        ["conv1", *_blocks("layer{}.{}.conv{}", (1, 2, 3, 4), (3, 4, 6, 3), (1, 2, 3))]
        + [f"layer{s}.0.shortcut.0" for s in (1, 2, 3, 4)],
        ["bn1", *_blocks("layer{}.{}.bn{}", (1, 2, 3, 4), (3, 4, 6, 3), (1, 2, 3))]
        + [f"layer{s}.0.shortcut.1" for s in (1, 2, 3, 4)],
        "linear",
    ),
    "wrn_16_1": keys(
        ["conv1", *_blocks("block{}.layer.{}.conv{}", (1, 2, 3), (2, 2, 2), (1, 2))]
        + ["block2.layer.0.convShortcut", "block3.layer.0.convShortcut"],
        ["bn1", *_blocks("block{}.layer.{}.bn{}", (1, 2, 3), (2, 2, 2), (1, 2))],
        "fc",
    ),
    "vgg13": keys(
        [f"block{b}.{k}" for b in range(5) for k in (0, 3)],
        [f"block{b}.{k}" for b in range(5) for k in (1, 4)],
        "classifier",
        bias=True,
    ),
    "mobilenetv2": keys(
        ["conv1.0", "conv2.0", *(name.format(k) for name in _MOBILE for k in (0, 3, 6))],
        ["conv1.1", "conv2.1", *(name.format(k) for name in _MOBILE for k in (1, 4, 7))],
        "classifier.0",
    ),
    "shufflev1": keys(
        ["conv1", *_blocks("layer{}.{}.conv{}", (1, 2, 3), (4, 8, 4), (1, 2, 3))],
        ["bn1", *_blocks("layer{}.{}.bn{}", (1, 2, 3), (4, 8, 4), (1, 2, 3))],
        "linear",
    ),
    "shufflev2": keys(
        ["conv1", "conv2", *_blocks("layer{}.{}.conv{}", (1, 2, 3), (4, 8, 4), (1, 2, 3))]
        + [f"layer{s}.0.conv{k}" for s in (1, 2, 3) for k in (4, 5)],
        ["bn1", "bn2", *_blocks("layer{}.{}.bn{}", (1, 2, 3), (4, 8, 4), (1, 2, 3))]
        + [f"layer{s}.0.bn{k}" for s in (1, 2, 3) for k in (4, 5)],
        "linear",
    ),
    "mobilenetv1": keys(
        ["model.0.0", *(f"model.{b}.{k}" for b in range(1, 14) for k in (0, 3))],
        ["model.0.1", *(f"model.{b}.{k}" for b in range(1, 14) for k in (1, 4))],
        "fc",
    ),
}


# --- Numbers of parameters, summed over the layers -----------------------------------------------


def convolution(channels_in, channels, side, groups=1):
    """Without bias, and the two numbers a channel of its normalization."""
    return channels_in // groups * channels * side**2 + 2 * channels


def resnet_parameters(depth, widths, classes):
    channels, *stages = widths
    total = convolution(3, channels, 3)
    for stage, width in enumerate(stages):
        for block in range((depth - 2) // 6):
            total += convolution(channels, width, 3) + convolution(width, width, 3)
            if block == 0 and (stage > 0 or channels != width):
                total += convolution(channels, width, 1)
            channels = width
    return total + classes * (channels + 1)


def mobilenetv2_parameters(width, classes):
    channels = int(32 * width)
    total = convolution(3, channels, 3)
    rows = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for times, full, blocks in rows:
        for _ in range(blocks):
            wide = times * channels
            total += convolution(channels, wide, 1) + convolution(wide, wide, 3, groups=wide)
            channels = int(full * width)
            total += convolution(wide, channels, 1)
    return total + convolution(channels, 1280, 1) + classes * 1281


def shufflev2_parameters(widths, classes):
    *stages, last = widths
    total, channels = convolution(3, 24, 1), 24
    for width, blocks in zip(stages, (3, 7, 3), strict=True):
        half = width // 2
        depthwise = convolution(half, half, 3, groups=half)
        total += convolution(channels, channels, 3, groups=channels) + depthwise
        total += 2 * convolution(channels, half, 1) + convolution(half, half, 1)
        total += blocks * (2 * convolution(half, half, 1) + depthwise)
        channels = width
    return total + convolution(channels, last, 1) + classes * (last + 1)


# --- What they compute, in eval mode -------------------------------------------------------------


class Weights:
    """A state dict, and the layers that it holds as functions."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, stride=1, groups=1):
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, name, x):
        mean, variance, weight, bias = (
            self.state[f"{name}.{end}"][:, None, None]
            for end in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def both(self, conv, norm, x, stride=1, groups=1):
        return self.norm(norm, self.conv(conv, x, stride, groups))

    def head(self, name, x):
        embedding = x.mean((2, 3))
        state = self.state
        return embedding, embedding @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def has(self, name):
        return any(key.startswith(f"{name}.") for key in self.state)

    def count(self, pattern):
        return next(n for n in range(100) if not self.has(pattern.format(n)))


def relu(x):
    return x.clamp(min=0)


def shuffled(x, groups):
    size = x.shape[1] // groups
    return x[:, [group * size + place for place in range(size) for group in range(groups)]]


def resnet(w, x):
    x = relu(w.both("conv1", "bn1", x))
    maps = [x]
    for stage in (1, 2, 3):
        for block in range(w.count(f"layer{stage}.{{}}")):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = relu(w.both(f"{name}.conv1", f"{name}.bn1", x, stride))
            y = w.both(f"{name}.conv2", f"{name}.bn2", y)
            if w.has(f"{name}.downsample"):
                x = w.both(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
            x = relu(x + y)
        maps.append(x)
    return maps, *w.head("fc", x)


def resnet50(w, x):
    x = relu(w.both("conv1", "bn1", x))
    maps = [x]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = relu(w.both(f"{name}.conv1", f"{name}.bn1", x))
            y = relu(w.both(f"{name}.conv2", f"{name}.bn2", y, stride))
            y = w.both(f"{name}.conv3", f"{name}.bn3", y)
            if block == 0:
                x = w.both(f"{name}.shortcut.0", f"{name}.shortcut.1", x, stride)
            x = relu(x + y)
        maps.append(x)
    return maps, *w.head("linear", x)


def wrn(w, x):
    x = w.conv("conv1", x)
    maps = [x]
    for stage in (1, 2, 3):
        for block in range(w.count(f"block{stage}.layer.{{}}")):
            name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            active = relu(w.norm(f"{name}.bn1", x))
            y = relu(w.norm(f"{name}.bn2", w.conv(f"{name}.conv1", active, stride)))
            y = w.conv(f"{name}.conv2", y)
            if w.has(f"{name}.convShortcut"):
                x = w.conv(f"{name}.convShortcut", active, stride)
            x = x + y
        maps.append(x)
    return maps, *w.head("fc", relu(w.norm("bn1", x)))


def vgg(w, x):
    maps = []
    for block in range(5):
        for layer in range(0, 12, 3):
            if w.has(f"block{block}.{layer}"):
                x = relu(w.both(f"block{block}.{layer}", f"block{block}.{layer + 1}", x))
        maps.append(x)
        if block < 3:
            x = F.max_pool2d(x, 2, 2)
    return maps, *w.head("classifier", x)


def mobilenetv2(w, x):
    x = relu(w.both("conv1.0", "conv1.1", x, 2))
    maps = [x]
    strides = (1, 1, 2, 2, 1, 2, 1)
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for block in range(blocks):
            name, stride = f"blocks.{stage}.{block}.conv", strides[stage] if block == 0 else 1
            y = relu(w.both(f"{name}.0", f"{name}.1", x))
            y = relu(w.both(f"{name}.3", f"{name}.4", y, stride, groups=y.shape[1]))
            y = w.both(f"{name}.6", f"{name}.7", y)
            x = x + y if block > 0 else y  # the first of a stage changes channels or size
        if stage in (1, 2, 4, 6):
            maps.append(x)
    return maps, *w.head("classifier.0", relu(w.both("conv2.0", "conv2.1", x)))


def shufflev1(w, x):
    x = relu(w.both("conv1", "bn1", x))
    maps = [x]
    for stage, blocks in enumerate((4, 8, 4), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 else 1
            groups = 1 if stage == 1 and block == 0 else 3
            y = shuffled(relu(w.both(f"{name}.conv1", f"{name}.bn1", x, 1, groups)), groups)
            y = relu(w.both(f"{name}.conv2", f"{name}.bn2", y, stride, groups=y.shape[1]))
            y = w.both(f"{name}.conv3", f"{name}.bn3", y, 1, 3)
            if block == 0:
                x = relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
            else:
                x = relu(y + x)
        maps.append(x)
    return maps, *w.head("linear", x)


def shufflev2(w, x):
    x = relu(w.both("conv1", "bn1", x))
    maps = [x]
    for stage, blocks in enumerate((4, 8, 4), start=1):
        left = f"layer{stage}.0"
        a = w.both(f"{left}.conv1", f"{left}.bn1", x, 2, groups=x.shape[1])
        a = relu(w.both(f"{left}.conv2", f"{left}.bn2", a))
        b = relu(w.both(f"{left}.conv3", f"{left}.bn3", x))
        b = w.both(f"{left}.conv4", f"{left}.bn4", b, 2, groups=b.shape[1])
        b = relu(w.both(f"{left}.conv5", f"{left}.bn5", b))
        x = shuffled(torch.cat([a, b], 1), 2)
        for block in range(1, blocks):
            name, half = f"layer{stage}.{block}", x.shape[1] // 2
            y = relu(w.both(f"{name}.conv1", f"{name}.bn1", x[:, half:]))
            y = w.both(f"{name}.conv2", f"{name}.bn2", y, groups=half)
            y = relu(w.both(f"{name}.conv3", f"{name}.bn3", y))
            x = shuffled(torch.cat([x[:, :half], y], 1), 2)
        maps.append(x)
    return maps, *w.head("linear", relu(w.both("conv2", "bn2", x)))


def mobilenetv1(w, x):
    maps = []
    x = relu(w.both("model.0.0", "model.0.1", x, 2))
    strides = (0, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    for block in range(14):
        if block > 0:
            name = f"model.{block}"
            x = relu(w.both(f"{name}.0", f"{name}.1", x, strides[block], groups=x.shape[1]))
            x = relu(w.both(f"{name}.3", f"{name}.4", x))
        if block in (0, 3, 5, 11, 13):
            maps.append(x)
    return maps, *w.head("fc", x)


COMPUTED = {
    "resnet": resnet,
    "resnet50": resnet50,
    "wrn": wrn,
    "vgg": vgg,
    "mobilenetv2": mobilenetv2,
    "shufflev1": shufflev1,
    "shufflev2": shufflev2,
    "mobilenetv1": mobilenetv1,
}
