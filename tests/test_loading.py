"""Classifiers loaded from files, and `topkd predict`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from topkd.data import DATA
from topkd.evaluation import metrics
from topkd.evaluation.loading import load
from topkd.models import MODELS, checkpoint

ABOUT = {
    "model": "resnet8x0.25",
    "classes": ["ant", "bee", "cat"],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "size": 16,
    "data": {"name": "folder", "root": "absent", "size": 16},
}


def written(folder, **changes):
    """Writes the weights of a new network with metadata."""
    about = ABOUT | changes
    path = folder / "student.safetensors"
    network = MODELS["resnet8x0.25"].network(classes=len(about["classes"]))
    checkpoint.save_weights(path, network, about)
    return path


@pytest.fixture
def pictures(tmp_path):
    """A data set of folders with pictures of several sizes."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ABOUT["classes"]:
            for number, size in enumerate([(20, 30), (16, 16), (40, 25)]):
                path = tmp_path / "data" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize("options", [{}, {"crop": 0.8}, {"padding": 2}])
def test_pictures_are_prepared_as_for_evaluation(tmp_path, pictures, options):
    options = {"size": 16} | options
    classifier = load(written(tmp_path, data={"name": "folder", "root": "x"} | options))
    data = DATA["folder"](
        root=str(pictures), mean=tuple(ABOUT["mean"]), std=tuple(ABOUT["std"]), **options
    )
    evaluated = metrics.predict(classifier.features, data.test, torch.device("cpu"))
    paths = [data.test.stored.name(place) for place in range(9)]
    torch.testing.assert_close(classifier.predict(paths), evaluated.logits.softmax(1))
    opened = [Image.open(path) for path in paths]
    assert torch.equal(classifier.predict(opened), classifier.predict(paths))


def test_a_tensor_is_only_normalized(tmp_path):
    classifier = load(written(tmp_path))
    assert not classifier.training
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    floats = images.float() / 255
    mean, std = (torch.tensor(ABOUT[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(classifier.normalize(floats), (floats - mean) / std)
    with torch.no_grad():
        expected = classifier(classifier.normalize(floats)).softmax(1)
    torch.testing.assert_close(classifier.predict(images), expected)
    assert torch.equal(classifier.predict(floats), expected)
    assert classifier.predict(images[:0]).shape == classifier.predict([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"expected a tensor \(n, 3, 16, 16\), got \(1, 3, 8, 8\)"),
        (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16).long(), "expected uint8 or floats"),
        (torch.full((1, 3, 16, 16), 200.0), r"expected values in \[0, 1\].*200"),
        (torch.full((1, 3, 16, 16), torch.nan), r"expected values in \[0, 1\].*nan"),
    ],
)
def test_tensors_of_another_shape_or_range_are_refused(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path)).predict(images)


def test_a_file_of_another_origin_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    about = {key: ABOUT[key] for key in ("model", "mean", "std")}
    checkpoint.save_weights(path, MODELS["resnet8x0.25"].network(classes=3), about)
    with pytest.raises(ValueError, match="does not record classes, size: it was not written by"):
        load(path)
    with pytest.raises(FileNotFoundError, match="there is no run or file absent"):
        load("absent")


def test_code_runs_only_with_trust(tmp_path, monkeypatch):
    source = "from topkd.models import MODELS\n\n\ndef small(classes):\n"
    source += "    return MODELS['resnet8x0.25'].network(classes=classes)\n"
    (tmp_path / "their_code.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, model="their_code:small", taps={"head": "fc", "maps": []})
    with pytest.raises(ValueError, match="asks to run their_code:small.*--trust"):
        load(path)
    assert load(path, trust=True).predict(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_nothing_that_the_data_section_names_is_opened(tmp_path):
    shards = {"name": "webdataset", "train": f"pipe:touch {tmp_path}/ran", "size": 16}
    assert load(written(tmp_path, data=shards)).crop.size == 16
    assert load(written(tmp_path, data={"name": "unheard of"})).crop.padding == 0
    assert not (tmp_path / "ran").exists()


def test_predict(tmp_path, pictures, call):
    run = written(tmp_path).parent
    picture = pictures / "val/bee/0.png"
    status, out, err = call("predict", run, picture, pictures / "train/ant", "--top", 2)
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["picture", "class", "probability"]
    assert len(lines) == 1 + 2 * 4
    probabilities = load(run).predict(picture)[0]
    best = int(probabilities.argmax())
    assert lines[1] == [str(picture), ABOUT["classes"][best], f"{probabilities[best]:.4f}"]
    status, out, _ = call("predict", run, picture, "--json")
    (entry,) = json.loads(out)
    assert entry["picture"] == str(picture)
    assert {made["class"] for made in entry["classes"]} == set(ABOUT["classes"])
    assert sum(made["probability"] for made in entry["classes"]) == pytest.approx(1)


def test_predict_names_what_it_cannot_read(tmp_path, pictures, call):
    run = written(tmp_path).parent
    (pictures / "val/bee/torn.png").write_bytes(b"torn")
    status, _, err = call("predict", run, pictures)
    assert status == 2
    assert "val/bee/torn.png: not a readable image: its bytes are of no known format" in err
    (tmp_path / "empty").mkdir()
    status, _, err = call("predict", run, tmp_path / "empty")
    assert (status, err.split(";")[0]) == (2, f"topkd: {tmp_path}/empty contains no picture")
    status, _, err = call("predict", run, tmp_path / "absent.png")
    assert (status, err) == (2, f"topkd: there is no file or folder {tmp_path}/absent.png\n")
