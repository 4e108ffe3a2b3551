"""Exports: every file answers as the network does, and all that serving needs is there."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config import recipe
from topkd.config.sections import DataSection
from topkd.data import DATA
from topkd.export import formats
from topkd.export.formats import FORMATS, Subject
from topkd.export.student import TOLERANCE, export
from topkd.models import MODELS, checkpoint
from topkd.training.build import load_data
from topkd.training.experiment import Experiment

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

QUIET = Progress(quiet=True)
ROOT = Path(__file__).parents[1]
TINY = {
    "name": "tiny",
    "data": {"name": "digits", "limit": 64},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}, {"name": "kd", "weight": 2.0, "temperature": 3.0}],
    "epochs": 1,
    "batch_size": 32,
    "threads": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, by the real stages."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "teacher.safetensors"
    checkpoint.save_weights(path, MODELS["resnet8x0.25"].build(10).network, {})
    taught_by = {"model": "resnet8x0.25", "checkpoint": str(path)}
    experiment = Experiment(recipe.parse(TINY | {"teacher": taught_by}), folder, QUIET)
    experiment.train_student(0)
    return folder / "tiny/kd/seed0"


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """An export of that run in every format."""
    folder = tmp_path_factory.mktemp("export") / "made"
    config = export(run, list(FORMATS), folder, QUIET, license="mit")
    return folder, config


@pytest.fixture(scope="module")
def digits():
    return DATA["digits"]()


def network_of(run: Path) -> torch.nn.Module:
    network = MODELS["resnet8x0.25"].network(classes=10)
    network.load_state_dict(load_file(run / "student.safetensors"))
    return network.eval()


def answers(path: Path, images: torch.Tensor) -> torch.Tensor:
    """What a file makes of images, by the library that the file is for."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    network = MODELS["resnet8x0.25"].network(classes=10)
    network.load_state_dict(load_file(path))
    return network.eval()(images)


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.pt2"])
@torch.no_grad()
def test_every_format_answers_as_the_network_for_any_number_of_images(made, run, name, count):
    images = 3 * torch.randn(count, 3, 8, 8)
    expected = network_of(run)(images)
    torch.testing.assert_close(answers(made[0] / name, images), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_what_is_told_of_a_file_is_so(made, run, digits, form):
    folder, config = made
    name = FORMATS[form].file
    told = config["files"][name]
    images = digits.test.read(torch.arange(540), None)
    expected, found = network_of(run)(images), answers(folder / name, images)
    assert told["checked_on"] == "the 540 test images of digits"
    assert told["bytes"] == (folder / name).stat().st_size
    assert told["sha256"] == files.sha256((folder / name).read_bytes())
    right = (found.argmax(1) == digits.test.target).double().mean().item()
    same = (found.argmax(1) == expected.argmax(1)).double().mean().item()
    stored = json.loads((run / "result.json").read_text(encoding="utf-8"))["last"]["top1"]
    assert told["top1"] == pytest.approx(100 * right)
    assert told["network_top1"] == pytest.approx(stored)
    assert told["agreement"] == pytest.approx(100 * same)
    assert told["largest_difference"] == pytest.approx(
        (found - expected).abs().max().item(), abs=1e-5
    )


def test_the_graph_is_the_bare_network(made):
    model = onnx.load(made[0] / "model.onnx")
    assert [(len(model.graph.input), i.name) for i in model.graph.input] == [(1, "images")]
    assert [o.name for o in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, [d.dim_value for d in shape[1:]]) == ("batch", [3, 8, 8])
    kinds = {node.op_type for node in model.graph.node}
    shaping = {"Reshape", "Shape", "Concat"}  # for any number of images; versions of torch differ
    assert kinds - shaping == {"Conv", "Relu", "Add", "ReduceMean", "Gemm"}
    assert model.opset_import[0].version == made[1]["files"]["model.onnx"]["opset"] >= 18


def test_eight_bits_are_eight_bits(made):
    folder, config = made
    model = onnx.load(folder / "model.int8.onnx")
    sizes = {onnx.TensorProto.INT8: 0, onnx.TensorProto.FLOAT: 0}
    for weight in model.graph.initializer:
        if weight.data_type in sizes:
            sizes[weight.data_type] += int(np.prod(weight.dims))
    assert sizes[onnx.TensorProto.INT8] > 5 * sizes[onnx.TensorProto.FLOAT]
    entry = config["files"]["model.int8.onnx"]
    tried = entry["agreement_on_training"]
    assert tried.keys() == {"static", "dynamic"}
    assert tried[entry["quantization"]] == max(tried.values())
    assert entry["agreement"] > 80


def test_nothing_tells_of_this_machine(made, run):
    places = [str(ROOT).encode(), str(run.parents[2]).encode(), str(Path.home()).encode() + b"/"]
    for path in made[0].iterdir():
        contents = [path.read_bytes()]
        if path.suffix == ".pt2":
            archive = zipfile.ZipFile(path)
            contents = [archive.read(name) for name in archive.namelist()]
        for place in places:
            assert not any(place in content for content in contents), (path.name, place)


def test_the_card_is_one_that_the_hub_reads(made, run):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(made[0] / "README.md", ignore_metadata_errors=False)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert card.data.license == "mit"
    assert {"topkd", "resnet8x0.25", "knowledge-distillation", "onnx"} <= {*card.data.tags}
    judged = card.data.eval_results[0]
    assert judged.dataset_name == "digits"
    assert judged.metric_value == pytest.approx(result["last"]["top1"], abs=0.005)
    assert "n = 1 seed" in judged.metric_name
    assert f"Top-1 accuracy {result['last']['top1']:.2f} % on the test images" in card.text
    assert "| kd | 2.0 | temperature: 3.0 |" in card.text
    for name in made[1]["files"]:
        assert f"| `{name}` |" in card.text
    (block,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert recipe.parse(yaml.safe_load(block)).losses == recipe.parse(TINY).losses


def test_the_code_on_the_card_runs(made, monkeypatch):
    monkeypatch.chdir(made[0])
    card = (made[0] / "README.md").read_text(encoding="utf-8")
    images = torch.zeros(2, 3, 8, 8)
    shapes = []
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        names = {"images": images.numpy() if "onnxruntime" in block else images}
        exec(block, names)  # noqa: S102  (our own card)
        shapes.append(tuple(names["logits"].shape))
    assert shapes == [(2, 10)] * 3


def test_configuration_has_what_serving_needs(made, digits):
    config = json.loads((made[0] / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads(json.dumps(made[1]))
    assert config["classes"] == list(digits.classes)
    assert config["mean"] == pytest.approx(digits.mean)
    assert config["std"] == pytest.approx(digits.std)
    assert (config["size"], config["crop"]) == (8, None)


def test_a_format_can_be_added_later(run, tmp_path):
    export(run, ["safetensors"], tmp_path / "out", QUIET, license="mit", limit=50)
    config = export(run, ["torch-export"], tmp_path / "out", QUIET)
    assert config["files"].keys() == {"model.safetensors", "model.pt2"}
    assert config["license"] == "mit"
    told = config["files"]["model.safetensors"]["checked_on"]
    assert told == "50 of the 540 test images of digits"
    assert "`model.safetensors`" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_what_was_exported_can_be_exported_again(made, tmp_path):
    config = export(made[0] / "model.safetensors", ["safetensors"], tmp_path / "out", QUIET)
    assert config["weights"] == made[1]["weights"]
    assert config["run"] is None
    assert "No results are recorded with these weights." in (tmp_path / "out/README.md").read_text(
        encoding="utf-8"
    )


@pytest.fixture
def elsewhere(tmp_path):
    """Weights of a network whose images are not on this machine."""
    about = {"model": "resnet8x0.25", "classes": list("abc"), "mean": [0.5] * 3, "std": [0.2] * 3}
    about["data"] = {"name": "cifar10", "root": str(tmp_path / "absent")}
    path = tmp_path / "elsewhere.safetensors"
    checkpoint.save_weights(path, MODELS["resnet8x0.25"].network(classes=3), about)
    return path


def test_without_images_random_ones_are_taken_and_it_is_said(elsewhere, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"absent.*; give --data root=FOLDER, or --size PIXELS"):
        export(elsewhere, ["torch-export"], tmp_path / "out", QUIET, trust=True)
    with pytest.raises(ValueError, match=r"asks to open data\.root=.*specify it yourself"):
        export(elsewhere, ["torch-export"], tmp_path / "out", QUIET)
    config = export(elsewhere, ["torch-export"], tmp_path / "out", Progress(), size=32)
    assert "verifying on 64 random images, without accuracy" in capsys.readouterr().err
    entry = config["files"]["model.pt2"]
    assert entry["checked_on"] == "64 random images"
    assert entry["top1"] is None
    assert entry["agreement"] == 100
    with pytest.raises(ValueError, match="needs training images for calibration: give --data"):
        export(elsewhere, ["onnx-int8"], tmp_path / "int8", QUIET, size=32)
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize(("error", "is_refused"), [(2e-4, True), (0.5e-4, False)])
def test_a_file_that_answers_otherwise_is_refused_and_not_left(
    run, tmp_path, monkeypatch, error, is_refused
):
    def write(subject, path):
        network = copy.deepcopy(subject.network)
        network.fc.bias.data += error
        checkpoint.save_weights(path, network, subject.about)
        return {}

    wrong = replace(FORMATS["safetensors"], write=write)
    monkeypatch.setitem(FORMATS, "safetensors", wrong)
    out = tmp_path / "out"
    if is_refused:
        with pytest.raises(
            ValueError, match=r"model\.safetensors differs .* by 0\.0002 on the 540"
        ):
            export(run, ["torch-export", "safetensors"], out, QUIET)
        assert not out.exists()
    else:
        config = export(run, ["safetensors"], out, QUIET)
        told = config["files"]["model.safetensors"]["largest_difference"]
        assert told == pytest.approx(error, rel=0.1)


def test_a_network_that_answers_nan_is_refused(elsewhere, tmp_path):
    weights = load_file(elsewhere)
    weights["fc.weight"][0] = 3e38  # finite, but products with it are not
    network = MODELS["resnet8x0.25"].network(classes=3)
    network.load_state_dict(weights)
    broken = tmp_path / "broken.safetensors"
    checkpoint.save_weights(broken, network, checkpoint.read_about(elsewhere))
    with pytest.raises(ValueError, match="returns NaN or infinity for some of 64 random images"):
        export(broken, ["safetensors"], tmp_path / "out", QUIET, size=8)


class Untraceable(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, : 3 if images.sum() > 0 else 4]


def test_a_network_that_cannot_be_traced_is_one_line(tmp_path):
    subject = Subject(Untraceable(), {"model": "untraceable", "size": 8}, None)
    with pytest.raises(ValueError, match="^untraceable cannot be traced: [^\n]+$"):
        FORMATS["torch-export"].write(subject, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["resnet50", "vgg8", "wrn_16_1", "mobilenetv2", "shufflev1", "shufflev2"]
)
@torch.no_grad()
def test_every_family_can_be_written(model, tmp_path):
    about = {"model": model, "classes": ["a", "b", "c"], "size": 32}
    about |= {"mean": [0] * 3, "std": [1] * 3, "data": {"name": "cifar10"}}
    network = formats.build(about)
    network.train()(torch.randn(32, 3, 32, 32))  # so that batch normalization knows its place
    subject = Subject(network.eval(), about, None)
    images = torch.randn(5, 3, 32, 32)
    for name in ("safetensors", "onnx", "torch-export"):
        path = tmp_path / FORMATS[name].file
        FORMATS[name].write(subject, path)
        found = FORMATS[name].read(path)(images)
        torch.testing.assert_close(found, network(images), rtol=1e-4, atol=TOLERANCE)


def test_the_command_prints_the_comparison_and_nothing_else(run, made, tmp_path, call):
    out = tmp_path / "out"
    words = ("export", run, "--to", "safetensors, torch-export", "--to", "onnx", "--out", out)
    status, printed, err = call(*words, "--quiet")
    assert (status, err) == (0, "")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    for name, entry in config["files"].items():
        if name != "model.pt2":  # an archive, with the time in it
            assert entry == made[1]["files"][name]  # to the bit
        assert f"{entry['bytes']:,}" in lines[name]
        assert f"{entry['top1']:.2f}" in lines[name]
    assert "the network, on the 540 test images of digits" in printed
    words = ("export", run, "--to", "safetensors", "--out", out, "--json")
    status, printed, _ = call(*words)
    assert status == 0
    assert json.loads(printed)["files"]["model.onnx"]["agreement"] == 100


def test_mistakes_are_one_line(run, made, elsewhere, tmp_path, monkeypatch, call):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine", encoding="utf-8")
    checkpoint.save_weights(tmp_path / "bare.safetensors", torch.nn.Linear(1, 1), {})
    new = tmp_path / "new"
    wrong = [
        ((tmp_path / "none", "onnx", new), "there is no run"),
        ((run.parents[1], "onnx", new), f"is missing; there are {run}"),
        ((run, "onxx", new), "--to: there is no 'onxx'; did you mean 'onnx'?"),
        ((elsewhere, "onnx", made[0], "--size=8"), "holds another student; choose another --out"),
        ((run, "onnx", tmp_path / "full"), "already exists and is no export"),
        (
            (tmp_path / "bare.safetensors", "onnx", new),
            "does not record classes, data, mean, model",
        ),
        ((run, "onnx", new, "--data=root"), "data.name: there is no 'root'"),
        ((run, "onnx", new, "--data=rot=x"), "data.rot: unknown key"),
        ((run, "onnx", new, "--data=limit=x"), "data.limit: expected"),
        ((run, "onnx", new, "--data=name=digit"), "there is no 'digit'; did you mean 'digits'?"),
    ]
    for (target, to, out, *more), message in wrong:
        words = ("export", target, "--to", to, "--out", out, "--quiet", *more)
        status, printed, err = call(*words)
        assert (status, printed, err.count("\n")) == (2, "", 1), err
        assert message in err
        assert not new.exists()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, err = call("export", run, "--to", "onnx", "--out", new)
    assert (status, err) == (2, "topkd: this needs onnxruntime: pip install 'topkd[export]'\n")


def serve(tmp_path, *words):
    """Calls the example in a Python that has no torch and nothing of ours."""
    block = (
        "import sys\nfor name in ('torch', 'topkd', 'torchvision'):\n    sys.modules[name] = None\n"
    )
    (tmp_path / "blocked").mkdir(exist_ok=True)
    (tmp_path / "blocked/sitecustomize.py").write_text(block, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "blocked")}
    script = ROOT / "examples/serve_onnx.py"
    return subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )


def test_serving_needs_no_torch(made, run, digits, tmp_path):
    pictures = tmp_path / "pictures/inner"
    pictures.mkdir(parents=True)
    for i in range(70):  # more than a batch
        Image.fromarray(digits.test.pixels[i].numpy()).save(pictures / f"{i:02}.png")
    with torch.no_grad():
        logits = network_of(run)(digits.test.read(torch.arange(70), None))
    probability, best = logits.double().softmax(1).max(1)

    done = serve(tmp_path, made[0], tmp_path / "pictures", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["path"] for f in found] == [str(pictures / f"{i:02}.png") for i in range(70)]
    assert [f["class"] for f in found] == [digits.classes[k] for k in best]
    assert [f["probability"] for f in found] == pytest.approx(probability.tolist(), abs=1e-4)

    (pictures / "69.png").write_bytes(b"no picture")
    done = serve(tmp_path, made[0], tmp_path / "pictures", "--file", "model.int8.onnx")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{pictures / '69.png'}: not a readable picture: ")
    path, name, told = done.stdout.splitlines()[0].split("\t")
    assert (path, name in digits.classes, 0 < float(told) <= 1) == (
        f"{pictures}/00.png",
        True,
        True,
    )


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("serve_onnx", ROOT / "examples/serve_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_serving_refuses_another_file(example, made, tmp_path):
    (tmp_path / "config.json").write_bytes((made[0] / "config.json").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"model\.onnx is not the file that config\.json tells of"):
        example.Student(tmp_path)


@pytest.mark.parametrize(
    ("size", "options"), [(16, {}), (16, {"padding": 2}), (16, {"crop": 0.9}), (45, {}), (40, {})]
)
def test_serving_prepares_pictures_as_training_did(example, made, tmp_path, size, options):
    generator = np.random.default_rng(0)
    color = Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    gray16 = Image.fromarray(generator.integers(0, 65536, (40, 33), dtype=np.uint16))
    pictures = {
        "color": color,
        "gray": color.convert("L"),
        "palette": color.quantize(16),
        "clear": color.convert("RGBA"),
        "deep": gray16,
        "sideways": color,
    }
    exif = Image.Exif()
    exif[274] = 6  # the orientation of a picture taken with the camera on its side
    written = {name: {"exif": exif} if name == "sideways" else {} for name in pictures}
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        for name, picture in pictures.items():
            picture.save(tmp_path / part / "only" / f"{name}.png", **written[name])
    section = DataSection(name="folder", root=str(tmp_path), size=size, **options)
    data = load_data(section)
    about = {"model": "resnet8x0.25", "classes": ["only"], "mean": data.mean, "std": data.std}
    network = MODELS["resnet8x0.25"].network(classes=1)
    about["data"] = section.model_dump(mode="json")
    checkpoint.save_weights(tmp_path / "w.safetensors", network, about)
    student = example.Student(made[0])
    student.config = export(
        tmp_path / "w.safetensors", ["safetensors"], tmp_path / "out", QUIET, trust=True
    )
    paths = sorted((tmp_path / "val/only").iterdir())
    found = [student.prepare(Image.open(path)) for path in paths]
    expected = data.test.read(torch.arange(len(paths)), None).numpy()
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-5)
