"""Recipes whose images, batches and networks do not go together: one sentence, before any work."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from topkd.cli.app import app
from topkd.models import MODELS, checkpoint


@pytest.fixture
def forty(tmp_path):
    """Forty pictures of two classes, as many to train on as to evaluate on."""
    for number in range(40):
        for part in ("train", "val"):
            place = tmp_path / "pictures" / part / "ab"[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (6 * number, 0, 0)).save(place)
    return tmp_path / "pictures"


@pytest.fixture
def teacher(tmp_path):
    checkpoint.save_weights(tmp_path / "t.safetensors", MODELS["resnet8"].build(2).network, {})
    return tmp_path / "t.safetensors"


def topkd(command, forty, *changes, teacher=None):
    tree = f"""
        data: {{name: folder, root: {forty}, size: 8, padding: 1}}
        student: {{model: resnet8x0.25}}
        losses: [{{name: ce}}]
        epochs: 1
        precision: float32
    """
    if teacher is not None:
        tree += f"    teacher: {{model: resnet8, checkpoint: {teacher}}}\n"
    path = forty.parent / "own.yaml"
    path.write_text(tree, encoding="utf-8")
    out = [] if command == "check" else ["--out", str(forty.parent / "runs"), "--quiet"]
    result = CliRunner().invoke(app, [command, str(path), *changes, *out])
    assert result.exit_code
    return str(result.exception)


@pytest.mark.parametrize("command", ["run", "ripsnet", "student"])
def test_a_batch_of_more_images_than_there_are_is_refused_before_any_work(forty, command):
    said = topkd(command, forty)
    assert said == "40 training images are too few for a batch of 64; make batch_size smaller"


def test_a_teacher_is_not_trained_for_a_student_that_cannot_be(forty):
    (forty.parent / "teacher.yaml").write_text(
        f"""
        data: {{name: folder, root: {forty}}}
        student: {{model: resnet8}}
        losses: [{{name: ce}}]
        epochs: 1
        batch_size: 8
        """,
        encoding="utf-8",
    )
    section = f"teacher={{model: resnet8, recipe: {forty.parent / 'teacher.yaml'}}}"
    said = topkd("run", forty, section)
    assert said == "40 training images are too few for a batch of 64; make batch_size smaller"
    assert not list(forty.parent.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        (["data.limit=40"], 40),
        (["data={name: digits}", "batch_size=1258"], 1257),
        (["data={name: cifar10, root: nowhere}", "batch_size=50001"], 50_000),
        (["data={name: cifar100}", "batch_size=50001"], 50_000),
    ],
)
def test_check_refuses_the_batch_where_the_number_of_images_is_known(forty, changes, images):
    assert f"{images} training images are too few for a batch of" in topkd("check", forty, *changes)


@pytest.mark.parametrize("command", ["run", "student"])
def test_a_size_that_a_network_cannot_take_is_named_with_the_network(forty, command):
    said = topkd(command, forty, "data.size=7", "student.model=vgg8", "batch_size=8")
    assert said.startswith("vgg8 does not accept images of 7 px: ")
    assert "\n" not in said


def test_the_size_of_a_teacher_is_named_too(forty, teacher):
    section = f"teacher={{model: torchvision:vit_b_16, checkpoint: {teacher}, size: 9}}"
    said = topkd("run", forty, section, "batch_size=8")
    assert said.startswith("torchvision:vit_b_16 does not accept images of 9 px: ")


@pytest.mark.parametrize("model", ["torchvision:vgg11", "torchvision:vit_b_16"])
def test_evaluation_names_the_size_too(tmp_path, model):
    torch.save({}, tmp_path / "some.pth")
    words = ["evaluate", str(tmp_path / "some.pth"), "--model", model, "--data", "digits"]
    result = CliRunner().invoke(app, words)
    assert str(result.exception).startswith(f"{model} does not accept images of 8 px: ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named_where_they_are_loaded(forty, teacher, value):
    network = MODELS["resnet8"].build(2).network
    network.layer2[0].conv1.weight.data[0, 0, 0, 0] = value
    network.fc.bias.data[0] = value
    checkpoint.save_weights(teacher, network, {})
    said = topkd("run", forty, "batch_size=8", teacher=teacher)
    assert said.startswith(f"{teacher}: layer2.0.conv1.weight contains NaN or infinity; ")


def test_masks_may_be_infinite():
    network = torch.nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    checkpoint.fill(network, network.state_dict(), "transformer")
