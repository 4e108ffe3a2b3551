"""Files that are whole or absent, hashes by which changes are noticed, states, locks."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from reference.equality import same
from safetensors.torch import save
from torch import nn

from topkd._io import files, sealed, state

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


def test_a_state_comes_back_as_it_was(tmp_path):
    first = a_state(1)
    state.save(tmp_path, first)
    assert same(state.load(tmp_path), first)


def test_there_is_no_state_before_one_is_saved(tmp_path):
    assert state.load(tmp_path) is None
    assert state.load(tmp_path / "absent") is None


def test_the_last_state_and_the_one_before_are_kept(tmp_path):
    for number in (1, 2, 3):
        state.save(tmp_path, a_state(number))
    assert state.load(tmp_path)["history"][0]["epoch"] == 3
    assert len(list(tmp_path.glob("state-*.pt"))) == 2
    assert len(list(tmp_path.iterdir())) == 3  # and which is the last
    state.delete(tmp_path)
    assert state.load(tmp_path) is None


def test_the_same_state_may_be_saved_twice(tmp_path):
    first = a_state(1)
    state.save(tmp_path, first)
    state.save(tmp_path, first)
    assert same(state.load(tmp_path), first)


class Killed(BaseException):
    """The process is gone; nothing that it would have done afterwards is done."""


@pytest.mark.parametrize("step", range(8))
def test_a_crash_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch, step):
    old, new = a_state(1), a_state(2)
    state.save(tmp_path, a_state(0))
    state.save(tmp_path, old)
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
            state.save(tmp_path, new)
        except Killed:
            pass
        else:
            assert step == 7  # two files and their folder synced, the first state deleted
    found = state.load(tmp_path)
    assert same(found, old) or same(found, new)
    state.save(tmp_path, new)  # and the next one is saved as if nothing had been
    assert same(state.load(tmp_path), new)
    assert len(list(tmp_path.glob("state-*.pt"))) <= 2
    files.sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch, where):
    old = a_state(1)
    state.save(tmp_path, old)
    with monkeypatch.context() as patch:
        full_disk(patch, where)
        with pytest.raises(OSError, match=f"{tmp_path}.* could not be written: No space left"):
            state.save(tmp_path, a_state(2))
    assert same(state.load(tmp_path), old)


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
    state.save(tmp_path, a_state(1))
    (path,) = tmp_path.glob("state-*.pt")
    damage(path, how)
    with pytest.raises(ValueError, match=rf"{path.name} is .*; delete .*{tmp_path.name}"):
        state.load(tmp_path)


def test_a_state_that_would_grow_is_refused(tmp_path):
    saved, grown = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(100_000)}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(grown, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "state-0.pt").write_bytes(grown.getvalue())
    told = {"file": "state-0.pt", "hash": files.sha256(grown.getvalue())}
    files.write_sealed(tmp_path / "latest.json", told)
    with pytest.raises(ValueError, match=r"state-0\.pt is refused: it is compressed"):
        state.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"file": "stat', "{}", "[]", "null"])
def test_a_damaged_pointer_is_named(tmp_path, content):
    state.save(tmp_path, a_state(1))
    (tmp_path / "latest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"latest\.json"):
        state.load(tmp_path)


def test_a_state_that_runs_code_is_refused(tmp_path):
    state.save(tmp_path, a_state(1))
    (path,) = tmp_path.glob("state-*.pt")
    torch.save({"evil": Evil(tmp_path / "ran")}, path)
    pointer = {"file": path.name, "hash": files.sha256(path.read_bytes())}
    files.write_sealed(tmp_path / "latest.json", pointer)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        state.load(tmp_path)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


# --- Hashes --------------------------------------------------------------------------------------


def flips(content):
    """The content with one bit flipped, at fifty places and in the first and last bytes."""
    places = {0, 1, 8, 9, len(content) - 1, *range(0, len(content), max(1, len(content) // 50))}
    for place in sorted(places):
        for bit in (1, 64):
            yield content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def test_a_flipped_bit_of_sealed_json_is_noticed(tmp_path):
    path = tmp_path / "result.json"
    values = {"top1": 90.0, "losses": [{"name": "ce"}], "text": "äöü", "none": None}
    files.write_sealed(path, values)
    assert files.read_sealed(path) == values
    for content in flips(path.read_bytes()):
        path.write_bytes(content)
        try:
            found = files.read_sealed(path)
        except ValueError:
            continue
        assert found == values  # a space became another one


def test_a_flipped_bit_of_sealed_tensors_is_noticed():
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.tensor(1.5)}
    about = {"model": "resnet8", "classes": ["a", "b"]}
    content = sealed.pack(tensors, about)
    assert same(sealed.unpack(content, "x")[0], tensors)
    assert sealed.unpack(content, "x")[1] == about
    for changed in flips(content):
        try:
            found, told = sealed.unpack(changed, "x")
        except ValueError:
            continue
        assert same(found, tensors)
        assert told in (about, {})  # a space became another one, or the key's name changed


def test_sealed_tensors_are_the_same_bytes_every_time():
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    contents = {sealed.pack(tensors, {"b": 1, "a": [None, 0.5]}) for _ in range(20)}
    assert len(contents) == 1


@pytest.mark.parametrize(
    "told", ["", "null", "[]", "{}", '{"about": 1, "sha256": "x"}', "[" * 9999]
)
def test_metadata_of_the_wrong_kind_is_refused(told):
    with pytest.raises(ValueError, match="x was altered"):
        sealed.unpack(save({"a": torch.ones(2)}, {sealed.KEY: told}), "x")


def test_tensors_of_others_need_no_hash():
    found, about = sealed.unpack(save({"a": torch.ones(2)}, {"format": "pt"}), "x")
    assert same(found, {"a": torch.ones(2)})
    assert about == {}


@pytest.mark.parametrize("how", ["cut off", "one bit", "empty"])
def test_a_checked_file_that_was_altered_is_named(tmp_path, how):
    path = tmp_path / "ripsnet.safetensors"
    files.write_checked(path, b"the content")
    assert files.is_complete(path)
    assert files.read_checked(path) == b"the content"
    damage(path, how)
    with pytest.raises(ValueError, match="ripsnet.safetensors was altered; delete it"):
        files.read_checked(path)
    path.unlink()
    assert not files.is_complete(path)


# --- Locks ---------------------------------------------------------------------------------------


def adds(path, count):
    for _ in range(count):
        with files.locked(path, lambda: None):
            path.write_text(str(int(path.read_text(encoding="utf-8")) + 1), encoding="utf-8")


def test_a_lock_keeps_processes_apart(tmp_path):
    path = tmp_path / "number"
    path.write_text("0", encoding="utf-8")
    spawned = multiprocessing.get_context("spawn")
    workers = [spawned.Process(target=adds, args=(path, 50)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_text(encoding="utf-8") == "100"


def test_who_waits_for_a_lock_says_so(tmp_path):
    import threading

    said, path = [], tmp_path / "work"
    with files.locked(path, lambda: said.append("first")):
        waiting = threading.Thread(
            target=lambda: files.locked(path, lambda: said.append("second")).__enter__()
        )
        waiting.start()
        while not said:
            waiting.join(0.01)
    waiting.join()
    assert said == ["second"]


@pytest.mark.skipif(os.name != "posix", reason="asks whether a process runs")
def test_what_a_killed_write_left_goes_with_the_next_write(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout.strip()
    machine = files._owner().partition("-")[0]
    names = (f"{machine}-{dead}", f"{machine}-{os.getpid()}", f"000000-{dead}")
    for name in names:
        (tmp_path / f".a.json.{name}.abc.tmp").write_bytes(b"half")
    files.write(tmp_path / "a.json", "{}")
    left = {path.name for path in tmp_path.glob(".a.json.*.tmp")}
    # Those of a process that runs, and of another machine, may still be written.
    assert left == {f".a.json.{name}.abc.tmp" for name in names[1:]}
