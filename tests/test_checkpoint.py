"""Files that are whole or absent, states that survive a crash, weights that run no code."""

import argparse
import errno
import fractions
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from topkd import checkpoint, files

# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"\0\1bytes", "text, äöü", b""])
def test_a_file_is_written_and_written_over(tmp_path, content):
    path = tmp_path / "some" / "folders" / "file"
    files.write(path, "old")
    files.write(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def fails(number):
    def function(*args, **options):
        raise OSError(number, os.strerror(number))

    return function


class Full:
    """A file on a full disk: it takes some bytes, then no more."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(monkeypatch, where):
    if where == "write":
        opened = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *args, **options: Full(opened(*args, **options)))
    else:
        monkeypatch.setattr(os, where, fails(errno.ENOSPC))


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    files.write(path, "old")
    full_disk(monkeypatch, where)
    with pytest.raises(OSError, match="could not be written: No space left") as caught:
        files.write(path, "new and longer")
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    files.write(path, "old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "old"


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        files.write(tmp_path / "file" / "inside", "content")


def test_json_there_and_back(tmp_path):
    value = {"numbers": [1, 2.5, -1e-30], "text": "äöü", "nothing": None}
    files.write_json(tmp_path / "file.json", value)
    assert files.read_json(tmp_path / "file.json") == value
    (tmp_path / "file.json").write_text('{"half":', encoding="utf-8")
    with pytest.raises(ValueError, match=r"file.json is not JSON"):
        files.read_json(tmp_path / "file.json")
    lines = files.json_lines([{"a": 1}, {"a": 2}]).splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1}, {"a": 2}]


def test_hash_is_sha256():
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(b"abc") == expected


# --- States --------------------------------------------------------------------------------------


def a_state(number):
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [{"epoch": number, "losses": {"ce": 0.5}, "nothing": None}],
    }


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_a_state_comes_back_as_it_was(tmp_path):
    state = a_state(1)
    checkpoint.save_state(tmp_path, state)
    assert same(checkpoint.load_state(tmp_path), state)


def test_there_is_no_state_before_one_is_saved(tmp_path):
    assert checkpoint.load_state(tmp_path) is None
    assert checkpoint.load_state(tmp_path / "absent") is None


def test_only_the_last_state_is_kept(tmp_path):
    for number in (1, 2, 3):
        checkpoint.save_state(tmp_path, a_state(number))
    assert checkpoint.load_state(tmp_path)["history"][0]["epoch"] == 3
    assert len(list(tmp_path.iterdir())) == 2  # the state, and which it is


def test_the_same_state_may_be_saved_twice(tmp_path):
    state = a_state(1)
    checkpoint.save_state(tmp_path, state)
    checkpoint.save_state(tmp_path, state)
    assert same(checkpoint.load_state(tmp_path), state)


class Killed(BaseException):
    """The process is gone; nothing that it would have done afterwards is done."""


@pytest.mark.parametrize("step", range(6))
def test_a_crash_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch, step):
    old, new = a_state(1), a_state(2)
    checkpoint.save_state(tmp_path, old)
    steps = []

    def dies(function):
        def instead(*args, **options):
            steps.append(function)
            if len(steps) > step:
                raise Killed
            return function(*args, **options)

        return instead

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, dies(getattr(os, name)))
        patch.setattr(Path, "unlink", dies(Path.unlink))  # nobody tidies up either
        try:
            checkpoint.save_state(tmp_path, new)
        except Killed:
            pass
        else:
            assert step == 5  # two files written and renamed, the old one deleted
    found = checkpoint.load_state(tmp_path)
    assert same(found, old) or same(found, new)
    checkpoint.save_state(tmp_path, new)  # and the next one is saved as if nothing had been
    assert same(checkpoint.load_state(tmp_path), new)
    assert len(list(tmp_path.glob("state-*.pt"))) == 1


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch, where):
    old = a_state(1)
    checkpoint.save_state(tmp_path, old)
    with monkeypatch.context() as patch:
        full_disk(patch, where)
        with pytest.raises(OSError, match=f"{tmp_path}.* could not be written: No space left"):
            checkpoint.save_state(tmp_path, a_state(2))
    assert same(checkpoint.load_state(tmp_path), old)


def damage(path, how):
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[:-1])
    elif how == "one bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut off", "one bit", "empty", "gone"])
def test_a_damaged_state_is_named_and_not_used(tmp_path, how):
    checkpoint.save_state(tmp_path, a_state(1))
    (path,) = tmp_path.glob("state-*.pt")
    damage(path, how)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged; delete .*{tmp_path.name}"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"file": "stat', "{}", "[]", "null"])
def test_a_damaged_pointer_is_named(tmp_path, content):
    checkpoint.save_state(tmp_path, a_state(1))
    (tmp_path / "latest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"latest\.json"):
        checkpoint.load_state(tmp_path)


def test_a_state_that_runs_code_is_refused(tmp_path):
    checkpoint.save_state(tmp_path, a_state(1))
    (path,) = tmp_path.glob("state-*.pt")
    torch.save({"evil": Evil(tmp_path / "ran")}, path)
    pointer = {"file": path.name, "sha256": files.sha256(path.read_bytes())}
    (tmp_path / "latest.json").write_text(json.dumps(pointer), encoding="utf-8")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        checkpoint.load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


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


def load_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of files it does not like
        return checkpoint.load_weights(path)


@pytest.mark.parametrize("tree", UNDERSTOOD.values(), ids=UNDERSTOOD)
@pytest.mark.parametrize("archive", [True, False])
def test_weights_of_others_are_understood(tmp_path, tree, archive):
    path = tmp_path / "weights.pth"
    torch.save(tree, path, _use_new_zipfile_serialization=archive)
    assert same(checkpoint.load_weights(path), WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_safetensors_are_understood(tmp_path, prefix):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save_safetensors(named(prefix)))
    assert same(checkpoint.load_weights(path), WEIGHTS)


def test_a_prefix_that_not_all_names_have_is_a_part_of_the_names(tmp_path):
    tree = named("module.") | {"other": torch.zeros(1)}
    torch.save(tree, tmp_path / "weights.pth")
    assert checkpoint.load_weights(tmp_path / "weights.pth").keys() == tree.keys()


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
    with pytest.raises(ValueError, match=r"weights.pth is (refused: .*system|not a whole check)"):
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
    with pytest.raises(ValueError, match=f"weights.pth is refused: to load it would run {what}"):
        checkpoint.load_weights(tmp_path / "weights.pth")


def whole_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    return (tmp_path / "whole.pth").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(tmp_path, size):
    whole, path = whole_file(tmp_path), tmp_path / "weights.pth"
    path.write_bytes(whole[: size if size >= 1 else int(size * len(whole))])
    with pytest.raises(ValueError, match="weights.pth is not a whole checkpoint of PyTorch"):
        load_quietly(path)


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02.", b"{}", bytes(range(256))])
def test_garbage_is_named(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pth is not a whole checkpoint of PyTorch"):
        load_quietly(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", save_safetensors(WEIGHTS)[:-1], struct.pack("<Q", 2**60), b"\2" + bytes(9)],
)
def test_safetensors_that_are_not_whole_are_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.safetensors is not a whole safetensors file"):
        checkpoint.load_weights(path)


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
        ({"weight": torch.zeros(3), "epoch": 3}, "weight, epoch"),
        ({0: torch.zeros(3)}, "0"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, tree, found):
    torch.save(tree, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth holds no state dict; it holds {found}"):
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
        ({"epoch": 240}, None),
        ({"accuracy": {"top1": 71.74}}, None),
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
        ("weights.safetensors", b""),
        ("weights.safetensors", b"garbage, and more of it"),
        ("weights.safetensors", save_safetensors(WEIGHTS)),
        ("weights.safetensors", save_safetensors(WEIGHTS, {"topkd": "no JSON"})),
        ("weights.safetensors", struct.pack("<Q", 2) + b"[]"),
    ],
)
def test_nothing_is_known_about_files_of_others(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert checkpoint.read_about(path) == {}


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
