"""Weights of ours and of others, which run no code when they are read."""

import argparse
import fractions
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from reference.equality import same
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.optim.swa_utils import AveragedModel

from topkd.models import checkpoint

# --- Foreign weights -----------------------------------------------------------------------------

WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def named(prefix):
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


UNDERSTOOD = {
    "bare": WEIGHTS,
    "bare, with a number": WEIGHTS | {"epoch": 3},
    "bare, with two accuracies": WEIGHTS | {"acc": torch.tensor([71.0, 90.0])},
    "under model_state_dict": {"model_state_dict": WEIGHTS, "epoch": 3, "loss": torch.zeros(())},
    "under a key that nobody knows": {"wbrmf": WEIGHTS, "acc": torch.tensor([71.0, 90.0])},
    "of Lightning": {"state_dict": named("model."), "pytorch-lightning_version": "2.5"},
    "of Lightning, with a metric": {"state_dict": named("net.") | {"top1.total": torch.zeros(())}},
    "of a part of a whole": named("backbone.encoder."),
    "averaged by torch": named("module.") | {"n_averaged": torch.tensor(3)},
    "of an optimizer too": {
        "model_state_dict": WEIGHTS,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": []},
    },
    "averaged alone": {"state_dict_ema": WEIGHTS},
    "under model": {"model": WEIGHTS},
    "under state_dict": {"state_dict": WEIGHTS, "epoch": 3},
    "under student": {"student": WEIGHTS},
    "under net": {"net": WEIGHTS, "acc": 93.02, "epoch": 3},
    "a model's name beside them": {"model": "resnet56", "state_dict": WEIGHTS},
    "with options of a command line": {
        "opt": argparse.Namespace(
            model="resnet56", lr=0.05, lr_decay_epochs=[150, 180, 210], n_cls=100, resume=None
        ),
        "model": WEIGHTS,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.05}]},
    },
    "with a NumPy float64": {"model": WEIGHTS, "best_acc": np.float64(71.74)},
    "with a NumPy float32": {"model": WEIGHTS, "best_acc": np.float32(71.74)},
    "with a NumPy int64": {"model": WEIGHTS, "epoch": np.int64(240)},
    "data parallel": named("module."),
    "compiled": named("_orig_mod."),
    "student of a whole": named("student."),
    "compiled, then data parallel": named("module._orig_mod."),
    "data parallel, then compiled": named("_orig_mod.module."),
    "under model, data parallel": {"model": named("module."), "optimizer": {"lr": 0.1}},
    "under model, data parallel, student": {"model": named("module.student."), "best_acc": 71.5},
    "with its teacher and a projector": {
        "model": named("module.student.")
        | {"module.teacher.fc.weight": torch.zeros(2), "module.projector.bias": torch.zeros(1)},
        "optimizer": {"lr": 0.1},
    },
}


def taken(path, which="plain"):
    """What a network has that was filled with a file."""
    network = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    checkpoint.fill(network, checkpoint.load_weights(path), path.name, which)
    return dict(network.state_dict())


def load_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of files it does not like
        return checkpoint.load_weights(path)


@pytest.mark.parametrize("tree", UNDERSTOOD.values(), ids=UNDERSTOOD)
@pytest.mark.parametrize("archive", [True, False])
def test_weights_of_others_are_understood(tmp_path, tree, archive):
    path = tmp_path / "weights.pth"
    torch.save(tree, path, _use_new_zipfile_serialization=archive)
    assert same(taken(path), WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_safetensors_are_understood(tmp_path, prefix):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save_safetensors(named(prefix)))
    assert same(taken(path), WEIGHTS)


AVERAGED = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
BOTH = {
    "of timm": ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, "state_dict"),
    "of torchvision": (
        {
            "model": WEIGHTS,
            "model_ema": {f"module.{name}": tensor for name, tensor in AVERAGED.items()}
            | {"n_averaged": torch.tensor(9)},
        },
        "model",
    ),
    "of Lightning": (
        {"state_dict": named("net.") | {f"ema.module.{n}": t for n, t in AVERAGED.items()}},
        "state_dict.net",
    ),
    "by torch, under another name": (
        {
            "model": WEIGHTS,
            "second": {f"module.{name}": tensor for name, tensor in AVERAGED.items()}
            | {"n_averaged": torch.tensor(9)},
        },
        "model",
    ),
}


@pytest.mark.parametrize(("tree", "where"), BOTH.values(), ids=BOTH)
def test_of_plain_and_averaged_weights_one_chooses(tmp_path, tree, where):
    path = tmp_path / "weights.pth"
    torch.save(tree, path)
    assert same(taken(path), WEIGHTS)
    assert same(taken(path, "ema"), AVERAGED)
    network = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    said = checkpoint.fill(network, checkpoint.load_weights(path), path.name)
    assert said.startswith(f"plain weights, under '{where}'; the file also has ema ones, under '")


def test_averaged_weights_that_are_not_there_are_told(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS}, path)
    message = r"weights.pth has no averaged weights .* \(ema\), only plain ones under 'model'"
    with pytest.raises(ValueError, match=message):
        taken(path, "ema")


def test_weights_that_fit_twice_are_told(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"first": WEIGHTS, "second": AVERAGED}, path)
    message = "weights.pth has several weights that fit .* under 'first', 'second'; give a file"
    with pytest.raises(ValueError, match=message):
        taken(path)
    torch.save({"first": WEIGHTS, "again": WEIGHTS}, path)
    assert same(taken(path), WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_larger_network_is_refused_though_it_has_all_names(tmp_path, prefix):
    path = tmp_path / "weights.pth"
    torch.save(named(prefix) | {f"{prefix}layer2.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"layer2.weight: \(2,\) in the file, absent in the netw"):
        taken(path)


def test_names_that_have_nothing_in_common_are_told(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({f"a{n}.w": torch.zeros(1) for n in range(5)}, path)
    message = "none of its names are in the file, which has a0.w, a1.w, a2.w and 2 more; the"
    with pytest.raises(ValueError, match=f"{message} network has layer.weight, layer.bias$"):
        taken(path)


def test_a_file_that_holds_itself_is_read(tmp_path):
    tree = {"model": dict(WEIGHTS)}
    tree["model"]["again"] = tree
    for _ in range(60):  # 2^60 ways lead to the weights
        tree = {"one": tree, "other": tree}
    torch.save(tree, tmp_path / "circle.pth")
    assert same(taken(tmp_path / "circle.pth"), WEIGHTS)


def test_a_network_without_weights_takes_none():
    checkpoint.fill(nn.Flatten(), {}, "none")
    with pytest.raises(ValueError, match="a: .* in the file, absent in the network"):
        checkpoint.fill(nn.Flatten(), {"a": torch.zeros(1)}, "some")


def test_the_averages_of_torch_fill_the_network(tmp_path):
    average = AveragedModel(network())
    average.update_parameters(network())
    torch.save(average.state_dict(), tmp_path / "swa.pth")
    target = network()
    checkpoint.fill(target, checkpoint.load_weights(tmp_path / "swa.pth"), "swa.pth")
    assert same(dict(target.state_dict()), dict(average.module.state_dict()))


@pytest.mark.parametrize("archive", [True, False, "bare pickle"])
@pytest.mark.parametrize("inside", ["alone", "beside weights", "among options"])
def test_code_is_refused_and_not_run(tmp_path, archive, inside):
    path, trace = tmp_path / "weights.pth", tmp_path / "ran"
    tree = {
        "alone": Evil(trace),
        "beside weights": {"model": WEIGHTS, "extra": Evil(trace)},
        "among options": {"model": WEIGHTS, "opt": argparse.Namespace(lr=Evil(trace))},
    }[inside]
    if archive == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(trace), protocol=2))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"weights.pth is (refused: .*system|not a complete PyT)"):
        load_quietly(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"model": WEIGHTS, "rate": fractions.Fraction(1, 20)}, "fractions.Fraction"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_refused_is_named(tmp_path, tree, what):
    torch.save(tree, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth is refused: loading it would run {what}"):
        checkpoint.load_weights(tmp_path / "weights.pth")


def whole_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    return (tmp_path / "whole.pth").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(tmp_path, size):
    whole, path = whole_file(tmp_path), tmp_path / "weights.pth"
    path.write_bytes(whole[: size if size >= 1 else int(size * len(whole))])
    with pytest.raises(ValueError, match="weights.pth is not a complete PyTorch checkpoint"):
        load_quietly(path)


def _rewritten(path, compression, change=lambda name, content: content):
    """An archive of PyTorch written anew."""
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def _largest_memory(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("read", [checkpoint.load_weights, checkpoint.read_accuracy])
def test_an_archive_that_would_grow_is_refused(tmp_path, read, compression):
    path, block = tmp_path / "weights.pth", bytes(1 << 24)
    _rewritten(path, compression, lambda name, old: block if name.endswith("data/0") else old)
    assert path.stat().st_size < 1 << 18

    def refused():
        with pytest.raises(ValueError, match=r"weights\.pth is refused: it is compressed"):
            read(path)

    assert _largest_memory(refused) < 1 << 21


@pytest.mark.parametrize("lie", ["in the directory", "in the member", "twice in one place"])
def test_an_archive_that_lies_about_its_sizes_is_refused(tmp_path, lie):
    path = tmp_path / "weights.pth"
    _rewritten(path, zipfile.ZIP_DEFLATED if lie == "in the member" else zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"data/0") - len("archive/")  # its name in the directory at the end
    head = content.rindex(b"PK\x01\x02", 0, place)
    if lie == "in the directory":
        struct.pack_into("<2I", content, head + 20, 1 << 31, 1 << 31)
    elif lie == "in the member":  # compressed, and the directory says that it is not
        struct.pack_into("<H", content, head + 10, zipfile.ZIP_STORED)
    else:  # many names for the same bytes
        end = content.rindex(b"PK\x05\x06")
        entry = bytes(content[head : content.index(b"PK\x01\x02", place)])
        content[end:end] = 9 * entry
        counted = struct.unpack_from("<2HL", content, end + 9 * len(entry) + 8)
        told = (counted[0] + 9, counted[1] + 9, counted[2] + 9 * len(entry))
        struct.pack_into("<2HL", content, end + 9 * len(entry) + 8, *told)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth is (refused|not a complete PyTorch)"):
        checkpoint.load_weights(path)


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02.", b"{}", bytes(range(256))])
def test_garbage_is_named(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pth is not a complete PyTorch checkpoint"):
        load_quietly(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", save_safetensors(WEIGHTS)[:-1], struct.pack("<Q", 2**60), b"\2" + bytes(9)],
)
def test_safetensors_that_are_not_whole_are_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.safetensors is not a complete safetensors file"):
        checkpoint.load_weights(path)


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ([1, 2], "a list"),
        (torch.zeros(3), "a Tensor"),
        ({"best": 71.0, "epoch": 3, "opt": {"lr": 0.1}, "seed": 1}, "best, epoch, opt and 1 more"),
    ],
)
def test_what_holds_no_weights_is_told(tmp_path, tree, found):
    torch.save(tree, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=f"weights.pth contains no named weights; it contains {found}"
    ):
        checkpoint.load_weights(tmp_path / "weights.pth")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        checkpoint.load_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("noted", "percent"),
    [
        ({"best_acc": 71.74}, 71.74),
        ({"accuracy": np.float64(0.5)}, 50.0),
        ({"best_acc1": torch.tensor(76.5), "acc": 3.0}, 76.5),
        ({"best_prec1": torch.tensor(91.25), "epoch": 200}, 91.25),
        ({"epoch": 240}, None),
        ({"accuracy": {"top1": 71.74}}, None),
        ({"acc": torch.tensor([71.0, 90.0])}, None),
        ({"acc": float("nan")}, None),
        ({"accuracy": torch.zeros(2)}, None),
    ],
)
def test_the_accuracy_that_others_note_is_read(tmp_path, noted, percent):
    torch.save({"model": WEIGHTS} | noted, tmp_path / "weights.pth")
    assert checkpoint.read_accuracy(tmp_path / "weights.pth") == percent


def test_no_accuracy_is_noted_beside_bare_weights(tmp_path):
    torch.save(WEIGHTS, tmp_path / "weights.pth")
    assert checkpoint.read_accuracy(tmp_path / "weights.pth") is None
    torch.save([1, 2], tmp_path / "list.pth")
    assert checkpoint.read_accuracy(tmp_path / "list.pth") is None
    checkpoint.save_weights(tmp_path / "own.safetensors", network(), {})
    assert checkpoint.read_accuracy(tmp_path / "own.safetensors") is None


def test_the_accuracy_of_a_published_student_is_read(shared):
    path = shared("checkpoints/resnet20_cifar100_topkd.pth")
    assert checkpoint.read_accuracy(path) == pytest.approx(71.74)


# --- Weights of our own --------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_weights_come_back_as_they_were(tmp_path):
    first, second, path = network(), network(), tmp_path / "student.safetensors"
    first.to(memory_format=torch.channels_last)
    checkpoint.save_weights(path, first, {"model": "some", "classes": ["a", "b"]})
    checkpoint.fill(second, checkpoint.load_weights(path), path.name)
    assert same(dict(first.state_dict()), dict(second.state_dict()))
    assert checkpoint.read_about(path) == {"model": "some", "classes": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pth", b"anything"),
        ("weights.safetensors", save_safetensors(WEIGHTS)),
        ("weights.safetensors", save_safetensors(WEIGHTS, {"format": "pt"})),
    ],
)
def test_nothing_is_known_about_files_of_others(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert checkpoint.read_about(path) == {}


@pytest.mark.parametrize("read", [checkpoint.read_about, checkpoint.load_weights])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage, and more of it",
        struct.pack("<Q", 2) + b"[]",
        save_safetensors(WEIGHTS)[:-1],
        save_safetensors(WEIGHTS, {"topkd": "no JSON"}),
    ],
)
def test_what_a_damaged_file_says_of_itself_is_not_read(tmp_path, read, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} (is not a complete safe|was altered)"):
        read(path)


def test_fill_lists_the_first_that_differ():
    weights = dict(network().state_dict())
    weights["0.weight"] = torch.zeros(4, 3, 5, 5)
    del weights["0.bias"]
    weights["5.weight"] = weights.pop("3.weight")
    target = network()
    before = checkpoint.hash_of(target)
    with pytest.raises(ValueError, match="teacher.pth does not fit this network") as caught:
        checkpoint.fill(target, weights, "teacher.pth")
    assert str(caught.value).splitlines()[1:] == [
        "  0.bias: absent in the file, (4,) in the network",
        "  0.weight: (4, 3, 5, 5) in the file, (4, 3, 3, 3) in the network",
        "  3.weight: absent in the file, (2, 4) in the network",
        "  and 1 more",
        "  names in the file that the network does not have: 5.weight",
    ]
    assert checkpoint.hash_of(target) == before  # nothing was filled in


def test_fill_takes_weights_without_counts_of_batches():
    weights = {
        name: tensor for name, tensor in network().state_dict().items() if "num_batches" not in name
    }
    target = network()
    checkpoint.fill(target, weights, "old file")
    assert all(torch.equal(target.state_dict()[name], weights[name]) for name in weights)


def test_hash_knows_every_weight_and_the_statistics():
    first = network()
    hashes = {checkpoint.hash_of(first)}
    for tensor in first.state_dict().values():
        tensor += 1
        hashes.add(checkpoint.hash_of(first))
    assert len(hashes) == 1 + len(first.state_dict())


def test_hash_does_not_depend_on_layout():
    first = network()
    before = checkpoint.hash_of(first)
    assert checkpoint.hash_of(first.to(memory_format=torch.channels_last)) == before
