"""Files of unknown origin: what their metadata asks for is neither run nor opened."""

import shutil

import pytest
import torch

from topkd._io.progress import Progress
from topkd.config.sections import DataSection
from topkd.data import DATA
from topkd.data.sources.webdataset import webdataset
from topkd.data.trust import PLAIN
from topkd.export.student import export
from topkd.models import MODELS, checkpoint
from topkd.training.evaluate import evaluate_file

QUIET = Progress(quiet=True)
COMMANDS = {
    "evaluate": lambda path, out: evaluate_file(path, None, (), QUIET),
    "export": lambda path, out: export(path, ["safetensors"], out, QUIET),
}
ABOUT = {
    "model": "resnet8x0.25",
    "classes": [str(number) for number in range(10)],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "size": 8,
}


def written(folder, **about):
    path = folder / "weights.safetensors"
    checkpoint.save_weights(path, MODELS["resnet8x0.25"].build(10).network, ABOUT | about)
    return path


def hostile(place):
    """Data sections that would run a command or leave a trace, each in its own way."""
    command = f"touch {place}/ran"
    shards = {"name": "webdataset", "test": "x.tar", "cache": f"{place}/cache"}
    return {
        "command in root": shards | {"root": f"pipe:{command} #", "train": "x.tar"},
        "command in braces": shards | {"train": f"{{p,p}}ipe:{command}"},
        "command": shards | {"train": f"pipe:{command}"},
        "address that ends its quotes": shards | {"train": f"https://a.invalid/'; {command}; '"},
        "address": shards | {"train": "https://a.invalid/x.tar"},
        "cache": {"name": "webdataset", "root": ".", "cache": f"{place}/cache"},
        "classes": {"name": "webdataset", "classes": f"{place}/secret"},
        "folder": {"name": "folder", "root": str(place)},
        "download": {"name": "cifar10", "root": f"{place}/cifar", "download": True},
        "download alone": {"name": "cifar10", "download": True},
        "code": {"name": "dataset", "train": "os:getcwd", "test": "os:getcwd"},
        "unknown option": {"name": "digits", "place": str(place)},
    }


@pytest.mark.parametrize("kind", hostile("."))
@pytest.mark.parametrize("command", COMMANDS)
def test_what_metadata_asks_to_open_is_refused(kind, command, tmp_path):
    asked = tmp_path / "asked"
    asked.mkdir()
    path = written(tmp_path, data=hostile(asked)[kind])
    with pytest.raises(ValueError, match=r"weights\.safetensors asks to open data\.") as refused:
        COMMANDS[command](path, tmp_path / "out")
    assert "--trust" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(asked.iterdir())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", hostile("."))
def test_the_users_own_data_set_replaces_the_section_of_the_file(kind, tmp_path):
    path = written(tmp_path, data=hostile(tmp_path)[kind])
    assert evaluate_file(path, None, ["digits"], QUIET)["data"] == "digits"


def test_options_that_the_user_specifies_are_the_users_word(tmp_path):
    path = written(tmp_path, data={"name": "folder", "root": "theirs", "size": 8})
    with pytest.raises(FileNotFoundError, match="mine"):
        evaluate_file(path, None, [f"root={tmp_path / 'mine'}"], QUIET)
    with pytest.raises(FileNotFoundError, match="theirs"):
        evaluate_file(path, None, (), QUIET, trust=True)


def test_every_option_of_a_data_set_that_may_hold_a_path_is_outside_the_list():
    from inspect import signature

    text = {
        name
        for source in DATA.values()
        for name, option in signature(source).parameters.items()
        if "str" in str(option.annotation) or "Path" in str(option.annotation)
    }
    # Columns, extensions and names of classes open nothing.
    assert text & PLAIN == {"image", "label"}
    options = {name for source in DATA.values() for name in signature(source).parameters}
    assert options | DataSection.model_fields.keys() >= PLAIN


@pytest.mark.parametrize(
    ("about", "where"),
    [
        ({"data": ["digits"]}, "data: expected an object"),
        ({"data": {"name": ["digits"]}}, "data.name: expected string"),
        ({"data": None, "model": 5}, "model: expected string"),
        ({"mean": [0.5]}, r"mean\[1\]: missing"),
        ({"size": 10**9}, "size: expected less than or equal to"),
        ({"size": True}, "size: expected integer"),
        ({"classes": 10**9}, "classes: expected array"),
        ({"taps": {"maps": 5}}, "taps.maps: expected"),
        ({"taps": {"pretrained": True}}, "taps.pretrained: expected"),
        ({"reused": [1]}, "reused: expected an object"),
    ],
)
def test_metadata_of_wrong_types_is_one_line_that_says_where(about, where, tmp_path):
    path = written(tmp_path, **about)
    with pytest.raises(ValueError, match=rf"^{path}: metadata\.{where}"):
        evaluate_file(path, None, (), QUIET)


def test_a_path_whose_name_looks_like_a_command_is_a_path(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    from webdataset import TarWriter

    picture = torch.zeros(8, 8, 3).byte().numpy()
    for split in ("train", "val"):
        with TarWriter(str(tmp_path / f"{split}.tar")) as tar:
            tar.write({"__key__": "0", "png": picture, "cls": 0})
    monkeypatch.chdir(tmp_path)
    shutil.move("train.tar", "pipe:touch ran;#train.tar")
    found = webdataset(root=".", size=8)
    assert found.train.read(torch.arange(1), None).shape == (1, 3, 8, 8)
    with pytest.raises(FileNotFoundError, match="pipe:touch ran #/x.tar is missing"):
        webdataset(root="pipe:touch ran #", train="x.tar", test="x.tar")
    with pytest.raises(ValueError, match=r"data\.train: the address .* contains \"'\"; write it"):
        webdataset(train="https://a.invalid/';touch ran;'", test="val.tar", cache="c")
    assert not (tmp_path / "ran").exists()
