"""Metrics that a recipe requests, against scikit-learn, scipy, torchvision and plain loops."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.metrics import confusion_matrix, recall_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torchvision.transforms.v2 import functional
from typer.testing import CliRunner

from topkd._io.progress import Progress
from topkd.cli.app import app
from topkd.cli.printing import print_results
from topkd.config import recipe
from topkd.config import study as studies
from topkd.config.validation import RecipeError
from topkd.data import Data, InMemory
from topkd.data.corrupted import CORRUPTIONS, Corrupted
from topkd.evaluation import embeddings, metrics
from topkd.evaluation.per_class import per_class
from topkd.evaluation.results import collect
from topkd.features import Features
from topkd.reporting import page
from topkd.studies.collect import primary_metric
from topkd.training.check import check
from topkd.training.evaluate import evaluate_file
from topkd.training.experiment import Experiment

REQUESTED = ["knn", "probe", "retrieval", "corrupted", "per_class"]


def clusters(images, width=6, classes=5, noise=1.2):
    """Overlapping clusters of embeddings, with their labels."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    target = torch.arange(images) % classes
    return (centers[target] + noise * torch.randn(images, width)).double(), target


# --- Embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [300, 12])
def test_nearest_neighbors_vote_as_those_of_scikit_learn(images, monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 7)
    (train, train_target), (test, test_target) = clusters(images), clusters(100)
    reference = KNeighborsClassifier(
        min(20, images), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.numpy(), train_target.numpy())
    expected = 100 * reference.score(test.numpy(), test_target.numpy())
    found = embeddings.nearest_neighbor_accuracy(train, train_target, test, test_target)
    assert 30 < found < 95
    assert found == pytest.approx(expected)


def test_linear_probe_minimizes_the_penalized_loss_that_scipy_minimizes():
    (train, train_target), (test, test_target) = clusters(200), clusters(150)
    mean, std = train.mean(0), train.std(0, correction=0)
    x, z = (((part - mean) / std).numpy() for part in (train, test))
    y = np.eye(5)[train_target.numpy()]

    def loss(flat):
        weight, bias = flat[:30].reshape(6, 5), flat[30:]
        scores = x @ weight + bias
        return (logsumexp(scores, axis=1) - (scores * y).sum(1)).sum() + 0.5 * (weight**2).sum()

    best = minimize(loss, np.zeros(35), options={"gtol": 1e-3}).x
    predicted = (z @ best[:30].reshape(6, 5) + best[30:]).argmax(1)
    expected = 100 * (predicted == test_target.numpy()).mean()
    found = embeddings.linear_probe_accuracy(train, train_target, test, test_target)
    assert 30 < found < 95
    assert found == pytest.approx(expected, abs=0.7)  # one image


def test_linear_probe_is_bounded_and_undefined_for_one_class():
    train, target = clusters(100)
    again = embeddings.linear_probe_accuracy(train, target, train, target, iterations=1)
    assert again is not None
    one = torch.zeros(100).long()
    assert embeddings.linear_probe_accuracy(train, one, train, one) is None


def test_overlap_counts_the_neighbors_that_scikit_learn_finds(monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 13)
    student, teacher = clusters(60)[0], clusters(60, width=9)[0]
    near = [
        NearestNeighbors(n_neighbors=10, metric="cosine").fit(x.numpy()).kneighbors()[1]
        for x in (student, teacher)
    ]
    shared = [len(set(a) & set(b)) for a, b in zip(*map(np.ndarray.tolist, near), strict=True)]
    found = embeddings.neighbor_overlap(student, teacher)
    assert found == pytest.approx(100 * sum(shared) / 600)
    assert embeddings.neighbor_overlap(student, 3 * student) == 100
    assert embeddings.neighbor_overlap(student[:10], teacher[:10]) is None


def test_overlap_of_independent_embeddings_is_that_of_chance():
    points = torch.randn(2, 500, 8, dtype=torch.float64)
    assert embeddings.neighbor_overlap(*points) == pytest.approx(1000 / 499, abs=0.4)


# --- Corruptions ---------------------------------------------------------------------------------


def pictures(number, side=8):
    """Smooth random pictures, as JPEG expects them."""
    drawn = np.random.default_rng(5).uniform(0, 255, (number, side, side, 3))
    smooth = gaussian_filter(drawn, (0, 2, 2, 0)) * 3 - 255
    pixels = torch.from_numpy(smooth.clip(0, 255).astype(np.uint8))
    target = torch.arange(number) % 3
    return InMemory(pixels, target, (0.5,) * 3, (0.25,) * 3, padding=1, flip=False)


def corrupted(name, images, index=None):
    index = torch.arange(len(images.target)) if index is None else torch.tensor(index)
    return Corrupted(images, name, images.mean, images.std).read_bytes(index, None)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_change_images_and_depend_on_their_index_only(name):
    images = pictures(6)
    whole = corrupted(name, images)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.pixels.shape
    assert not torch.equal(whole, images.pixels)
    state = torch.get_rng_state()
    assert torch.equal(corrupted(name, images, [4, 1]), whole[[4, 1]])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("side", "deviation"), [(64, 0.08), (65, 0.18)])
def test_noise_has_the_deviation_of_the_benchmark_for_the_size(side, deviation):
    gray = torch.full((4, side, side, 3), 128, dtype=torch.uint8)
    images = InMemory(gray, torch.zeros(4).long(), (0.5,) * 3, (0.25,) * 3, padding=0, flip=False)
    noise = corrupted("noise", images).double() / 255
    assert noise.std().item() == pytest.approx(deviation, rel=0.02)
    assert not torch.equal(noise[0], noise[1])


def test_blur_is_that_of_torchvision_where_no_border_matters():
    images = pictures(3, side=16)
    planes = images.pixels.permute(0, 3, 1, 2).double()
    expected = functional.gaussian_blur(planes, [7, 7], [0.7, 0.7]).permute(0, 2, 3, 1)
    difference = (corrupted("blur", images).double() - expected)[:, 3:-3, 3:-3]
    assert difference.abs().max() <= 0.51


def test_contrast_moves_colors_towards_their_mean():
    images = pictures(2)
    for picture, changed in zip(images.pixels, corrupted("contrast", images), strict=True):
        for color in range(3):
            values = picture[..., color].flatten().tolist()
            mean = sum(values) / len(values)
            expected = [mean + 0.4 * (value - mean) for value in values]
            found = changed[..., color].flatten().tolist()
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 0.51


LUMINANCE = """
    16 11 10 16 24 40 51 61     12 12 14 19 26 58 60 55     14 13 16 24 40 57 69 56
    14 17 22 29 51 87 80 62     18 22 37 56 68 109 103 77   24 35 55 64 81 104 113 92
    49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
"""


def test_jpeg_leaves_multiples_of_the_steps_of_its_quality():
    """Table K.1 of the standard (ITU-T T.81), scaled to quality 58 as libjpeg does."""
    images = pictures(9)
    gray = (images.pixels[..., :1] // 2 + 64).expand(-1, -1, -1, 3)  # nothing is clipped
    images = InMemory(gray, images.target, (0.5,) * 3, (0.25,) * 3, padding=1, flip=False)
    table = np.array(LUMINANCE.split(), int).reshape(8, 8)
    step = (table * (200 - 2 * 58) + 50) // 100
    found = corrupted("jpeg", images)[..., 0].double().numpy()
    assert 0.5 < np.abs(found - gray[..., 0].numpy()).mean() < 10
    coefficients = dctn(found - 128, axes=(1, 2), norm="ortho")
    rounded = step * np.round(coefficients / step)
    assert np.abs(rounded).max() > 0
    assert np.abs(coefficients - rounded).max() < 1.5  # pixels are integers


def red(images):
    """A network that sorts images into three classes by their mean and their mean red."""
    mean = images.mean((1, 2, 3))
    logits = torch.stack([mean, images[:, 0].mean((1, 2)), -mean], 1)
    return Features(logits, logits)


def test_corrupted_is_the_mean_accuracy_over_the_corruptions():
    images = pictures(30)
    data = Data("smooth", images, images, ["a", "b", "c"], images.mean, images.std)
    accuracies = []
    for name in CORRUPTIONS:
        normalized = (corrupted(name, images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        right = red(normalized).logits.argmax(1) == images.target
        accuracies.append(100 * sum(right.tolist()) / 30)
    cpu = torch.device("cpu")
    evaluation = metrics.Evaluation(red, data, cpu, metrics.predict(red, images, cpu))
    found = metrics.requested_metrics(["corrupted"], evaluation, needs_teacher=False)
    assert found == {"corrupted": pytest.approx(sum(accuracies) / len(accuracies))}


def test_classifiers_are_fitted_to_a_bounded_stratified_part(monkeypatch):
    monkeypatch.setattr(metrics, "FITTED", 12)
    images, seen = pictures(60), []
    data = Data("smooth", images, pictures(9), ["a", "b", "c"], images.mean, images.std)

    def network(batch):
        seen.append(len(batch))
        return red(batch)

    cpu = torch.device("cpu")
    evaluation = metrics.Evaluation(network, data, cpu, metrics.predict(red, data.test, cpu))
    metrics.requested_metrics(["knn", "probe"], evaluation, needs_teacher=False)
    assert evaluation.training.target.bincount().tolist() == [4, 4, 4]
    assert seen == [12]


# --- Classes -------------------------------------------------------------------------------------


def test_results_by_class_are_those_of_scikit_learn():
    logits, target = torch.randn(90, 4), torch.randint(0, 3, (90,))  # none of the last class
    found = per_class(logits, target, list("abcd"))
    predicted = logits.argmax(1)
    recall = recall_score(target, predicted, labels=range(3), average=None)
    assert found["accuracy"] == pytest.approx(dict(zip("abc", 100 * recall, strict=True)))
    counts = [[found["confusion"].get(a, {}).get(b, 0) for b in "abcd"] for a in "abcd"]
    assert counts == confusion_matrix(target, predicted, labels=range(4)).tolist()


def test_equal_names_of_classes_are_not_mixed_up():
    logits = torch.eye(3)
    found = per_class(logits, torch.tensor([0, 1, 1]), ["crane", "cat", "crane"])
    assert found["accuracy"] == {"0": 100, "1": 50}


def test_more_than_200_classes_are_not_listed():
    logits = torch.randn(5, 201)
    assert per_class(logits, torch.arange(5), [str(number) for number in range(201)]) is None


# --- Recipes -------------------------------------------------------------------------------------


SMALL = {
    "name": "small",
    "data": {"name": "digits", "limit": 64, "test_limit": 50},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}, {"name": "kd"}],
    "epochs": 2,
    "batch_size": 32,
    "threads": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of one recipe with and without requested metrics, and their folder."""
    folder = tmp_path_factory.mktemp("requested")
    teacher = {key: SMALL[key] for key in ("data", "student", "batch_size")}
    teacher |= {"losses": [{"name": "ce"}], "epochs": 1}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(teacher), encoding="utf-8")
    section = {"model": "resnet8x0.25", "recipe": str(folder / "teacher.yaml")}
    results = {}
    for name, requested in (("plain", []), ("all", REQUESTED)):
        tree = SMALL | {"name": name, "teacher": section, "evaluation": requested}
        experiment = Experiment(recipe.parse(tree), folder, Progress(quiet=True))
        results[name] = experiment.train_student(0)
    return results, folder


def test_a_run_has_the_metrics_that_its_recipe_requests(runs):
    (plain, full), folder = runs[0].values(), runs[1]
    assert full["last"].keys() - plain["last"].keys() == {"knn", "probe", "corrupted"}
    compared = (result["teacher_similarity"].keys() for result in (full, plain))
    assert set.difference(*map(set, compared)) == {"retrieval"}
    assert full.keys() - plain.keys() == {"per_class"}
    hits = sum(row.get(name, 0) for name, row in full["per_class"]["confusion"].items())
    assert full["last"]["top1"] == pytest.approx(100 * hits / 50)
    # Training does not depend on what is measured after it.
    for name in ("student.safetensors", "examples.safetensors"):
        contents = [(folder / run / "kd/seed0" / name).read_bytes() for run in runs[0]]
        assert contents[0] == contents[1]


def test_tables_show_requested_metrics_where_a_run_has_them(runs, capsys):
    results, folder = runs
    titles = [metrics.METRICS[name].title for name in ("knn", "probe", "retrieval", "corrupted")]
    for name, expected in (("plain", False), ("all", True)):
        print_results([results[name]])
        shown = " ".join(capsys.readouterr().out.split())
        table = page.markdown(folder / name)
        for title in titles:
            assert (title.capitalize() in table) is expected
            assert (title.split()[-1] in shown) is expected
        rows = page.rows(collect(folder / name)[0])
        value = f"{results['all']['last']['knn']:.2f} (1)" if expected else "–"
        assert [row["knn"] for row in rows] == ["–", value]


def test_evaluation_of_a_file_repeats_the_metrics_of_the_run(runs):
    results, folder = runs
    words = ["evaluate", str(folder / "plain/kd/seed0"), "--json"]
    words += ["--metric", "knn", "--metric", "corrupted", "--quiet"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    for name in ("knn", "corrupted"):
        assert found[name] == pytest.approx(results["all"]["last"][name])
    assert found["per_class"] == results["all"]["per_class"]
    assert "probe" not in found
    with pytest.raises(RecipeError, match="--metric: retrieval cannot be computed without a"):
        evaluate_file(folder, None, [], Progress(quiet=True), requested=["retrieval"])


def test_recipes_without_requests_keep_their_hash():
    tree = SMALL | {"losses": [{"name": "ce"}]}
    plain = recipe.parse(tree)
    assert plain.hash == recipe.parse(tree | {"evaluation": []}).hash
    assert plain.hash != recipe.parse(tree | {"evaluation": ["knn"]}).hash


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kn", "evaluation[0]: there is no 'kn'; did you mean 'knn'?"),
        ("retrieval", "evaluation[0]: retrieval cannot be computed without a teacher"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(name, message):
    tree = SMALL | {"losses": [{"name": "ce"}], "evaluation": [name]}
    with pytest.raises(RecipeError) as error:
        check(recipe.parse(tree))
    assert str(error.value) == message


def test_a_study_compares_only_metrics_that_its_recipes_compute(tmp_path):
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(SMALL | {"losses": [{"name": "ce"}]}), encoding="utf-8"
    )
    tree = {"recipe": "r.yaml", "baseline": "ce", "seeds": 0, "primary": {"metric": "knn"}}
    tree |= {"variants": {"ce": [{"name": "ce"}]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"primary.metric: knn is computed on request only; set"):
        primary_metric(studies.load(tmp_path / "study.yaml"))
    plan = studies.load(tmp_path / "study.yaml", ("set.evaluation=[knn]",))
    assert primary_metric(plan).name == "knn"
