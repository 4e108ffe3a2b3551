"""Reports on small folders of results made by hand, and on one made by a real experiment."""

import copy
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from topkd._io import files
from topkd._io.progress import Progress
from topkd.cli.printing import print_results
from topkd.config.terms import Term
from topkd.data import DATA
from topkd.evaluation.metrics import METRICS, Metric, Predictions, prediction_metrics
from topkd.evaluation.results import Result, finished
from topkd.reporting import page as report
from topkd.reporting import plots, sections
from topkd.topology import PersistenceImage, RipsNet, rips
from topkd.topology.approximation import Approximation, Exact, Fidelity

CE, KD = {"name": "ce", "weight": 1.0, "warmup": 0}, {"name": "kd", "weight": 2.0, "warmup": 0}
TOPKD = {"name": "topkd", "weight": 5.0, "warmup": 0, "via": "ripsnet", "ripsnet": {"passes": 8}}
LOSSES = {"kd": [CE, KD], "ce": [CE], "kd+topkd": [CE, KD, TOPKD]}
FIDELITY = {"r2": 0.02, "gradient_cosine": -0.001, "gradient_cosine_low": -0.1, "clouds": 256}
RECIPE = {"controls": {"kd": [CE, KD], "ce": [CE]}, "batch_size": 16, "note": "<b>bold</b>"}
VOID = {"br", "img", "link", "meta"}


def result(variant: str, seed: int, top1: float, **changes: object) -> dict:
    """What ``experiment`` writes, in its form."""
    shares = {
        term["name"]: 1 / len(LOSSES.get(variant, [CE])) for term in LOSSES.get(variant, [CE])
    }
    if "topkd" in shares:
        shares |= {"ce": 0.3, "kd": 0.6998, "topkd": 0.0002}
    return {
        "recipe": "digits",
        "recipe_hash": "3f0a3080a40e",
        "variant": variant,
        "seed": seed,
        "model": "resnet8x0.25",
        "data": "digits",
        "losses": LOSSES.get(variant, [CE]),
        "epochs": 2,
        "eval_split": "test",
        "last": {"top1": top1, "top5": 100.0, "nll": 0.2, "ece": 2.5},
        "mean_of_last_10": top1 - 20,
        "best": {"epoch": 1, "top1": top1 + 1},
        "gradient_share": shares,
        "loss_metadata": {"topkd": {"via": "ripsnet", "fidelity": FIDELITY}}
        if variant == "kd+topkd"
        else {},
        "train_seconds": 5.9,
        "environment": {
            "topkd": "0.1.0",
            "commit": None,
            "python": "3.11.7",
            "torch": "2.14.1",
            "processor": "AMD EPYC",
            "threads": 2,
            "device": "cpu",
            "dtype": "bfloat16",
        },
        "teacher": {"model": "resnet20", "hash": "fdee", "top1": 99.0, "top5": 100.0},
        "teacher_similarity": {
            "agreement": 93.0,
            "kl": 0.2,
            "topological_distance": 0.2 + seed / 100,
        },
    } | changes


def put(folder: Path, *results: dict) -> Path:
    for content in results:
        path = folder / content["recipe"] / content["variant"] / f"seed{content['seed']}"
        path.mkdir(parents=True)
        files.write_sealed(path / "result.json", content)
    return folder


def put_files(folder: Path) -> Path:
    """Puts beside results what a run keeps: metrics, embeddings, the recipe and a RipsNet."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(40, 8, generator=generator)
    for path in folder.rglob("result.json"):
        terms = [term["name"] for term in json.loads(path.read_text(encoding="utf-8"))["losses"]]
        entries = [
            {
                "epoch": epoch,
                "test_top1": 40.0 * epoch,
                "losses": dict.fromkeys(terms, 1 / epoch),
                "gradient_share": dict.fromkeys(terms, 1 / len(terms)),
            }
            for epoch in (1, 2)
        ]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (path.parent / "metrics.jsonl").write_text(lines, encoding="utf-8")
        student = torch.randn(40, 4, generator=generator)
        kept = {"teacher": teacher, "student": student, "target": torch.arange(40) % 12}
        save_file(kept, path.parent / "examples.safetensors")
    (folder / "digits/recipe.yaml").write_text(
        yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8"
    )
    image = PersistenceImage.fit(rips(teacher[:32].view(2, 16, 8)))
    fidelity = Fidelity(r2=0.02, gradient_cosine=0.0, gradient_cosine_low=0.0, clouds=256, silent=0)
    approximation = Approximation(RipsNet(8), Exact(image), 16, 8, "fdee", fidelity)
    (folder / "digits/ripsnet-1.safetensors").write_bytes(approximation.to_bytes())
    return folder


def put_six(folder: Path) -> Path:
    gains = (0.25, 0.75, 0.5, 0.0, 1.0, 0.5)
    runs = [result("kd", seed, 90.0 + seed) for seed in range(6)]
    runs += [result("kd+topkd", seed, 90.0 + seed + gain) for seed, gain in enumerate(gains)]
    return put(folder, *runs)


@pytest.fixture
def six(tmp_path):
    """Six seeds of a control and of the recipe's own losses, 0.5 apart on average."""
    return put_six(tmp_path / "runs")


def first_two(points: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Stands for UMAP, which is slow to load."""
    return points[:, :2], "UMAP"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(plots, "project", first_two)


@pytest.fixture
def undrawn(monkeypatch, quick):
    """Leaves the pictures of a page empty, for tests that read its text."""
    monkeypatch.setattr(plots, "to_png", lambda figure: b"")
    monkeypatch.setattr(
        plots, "to_svg", lambda figure, *, prefix, alt: f'<svg aria-label="{escape(alt)}"></svg>'
    )


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.attributes, self.shown = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of six seeds with all their files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "project", first_two)
        return Page(report.html(put_files(put_six(tmp_path_factory.mktemp("page")))))


def collect_one(folder):
    (study,) = report.collect(folder)
    return study


def test_runs_are_grouped_by_recipe_variant_and_seed(tmp_path):
    teacher = result("kd+topkd", 0, 99.0, recipe="digits/teacher", recipe_hash="1", teacher=None)
    runs = [result(variant, seed, 90.0) for variant in ("kd+topkd", "ce", "kd") for seed in (10, 2)]
    studies = report.collect(put(tmp_path, teacher, *runs))
    assert [study.recipe for study in studies] == ["digits", "digits/teacher"]
    assert {
        variant: list(seeds) for variant, seeds in studies[0].variants.items()
    } == dict.fromkeys(("kd", "ce", "kd+topkd"), [2, 10])
    assert [study.baseline for study in studies] == ["kd", None]


def test_the_first_control_of_the_recipe_is_the_one_to_compare_with(tmp_path):
    put(tmp_path, *(result(variant, 0, 90.0) for variant in LOSSES))
    assert collect_one(tmp_path).baseline == "kd"  # it has most of the student's losses
    recipe = {"controls": {"ce": [CE], "kd": [CE, KD]}}
    (tmp_path / "digits/recipe.yaml").write_text(
        yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8"
    )
    assert collect_one(tmp_path).baseline == "ce"


def test_no_result_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"no result.json below {re.escape(str(tmp_path))}"):
        report.markdown(tmp_path)


def test_a_seed_that_appears_twice_is_an_error(tmp_path):
    put(tmp_path / "a", result("kd", 0, 90.0))
    put(tmp_path / "b", result("kd", 0, 91.0))
    with pytest.raises(
        ValueError, match=r"b/digits/kd/seed0/result\.json: seed 0 of variant 'kd'.*twice"
    ):
        report.collect(tmp_path)


def test_two_recipes_of_one_name_are_not_mixed(tmp_path):
    put(tmp_path / "a", result("kd", 0, 90.0))
    put(tmp_path / "b", result("kd", 1, 91.0, recipe_hash="other"))
    with pytest.raises(ValueError, match=r"b/digits/kd/seed1/result\.json: .*share the name"):
        report.collect(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"recipe": "digits"}, "recipe_hash is missing"),
        (result("kd", 0, 90.0, last={"top1": "high"}), r"last\.top1: .*got 'high'"),
        (result("kd", 0, float("nan")), r"last\.top1: expected a finite number"),
    ],
)
def test_a_broken_result_is_named(tmp_path, content, message):
    path = put(tmp_path, result("kd", 1, 90.0)) / "digits/kd/seed0/result.json"
    files.write_sealed(path, content)
    with pytest.raises(ValueError, match=f"kd/seed0/result.json .*{message}"):
        report.collect(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("90.0", "91.0"), "was altered"),
        (lambda text: text.replace('"sha256"', '"sha255"'), "was altered"),
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[]", "was altered"),
        (lambda text: "null", "was altered"),
        (lambda text: "[" * 100_000, "is not JSON"),
    ],
)
def test_an_altered_result_is_named(tmp_path, change, message):
    path = put(tmp_path, result("kd", 1, 90.0)) / "digits/kd/seed1/result.json"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=f"kd/seed1/result.json {message}"):
        report.collect(tmp_path)


@pytest.mark.parametrize("content", [b"", b"other", None])
def test_files_of_a_run_are_compared_with_their_hashes(tmp_path, content):
    folder = put(tmp_path, result("kd", 1, 90.0)) / "digits/kd/seed1"
    (folder / "metrics.jsonl").write_bytes(b"measured")
    run = files.read_sealed(folder / "result.json")
    recorded = {"files": files.hashes(folder, ["metrics.jsonl"])}
    files.write_sealed(folder / "result.json", run | recorded)
    report.collect(tmp_path)
    assert finished(folder)["seed"] == 1
    if content is None:  # as where results are kept without weights
        (folder / "metrics.jsonl").unlink()
        report.collect(tmp_path)
    else:
        (folder / "metrics.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl was altered after its run"):
            report.collect(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl (was altered|is missing)"):
        finished(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"epoch": 1', "metrics.jsonl is broken"),
        ("metrics.jsonl", b'{"epoch": 1}\n', "line 1 lacks gradient_share, losses"),
        ("examples.safetensors", b"torn", "examples.safetensors is broken"),
        ("../../recipe.yaml", b"a: [", "recipe.yaml is not YAML"),
    ],
)
def test_other_broken_files_are_named(six, quick, name, content, message):
    (put_files(six) / "digits/kd/seed0" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        report.html(six)


def test_losses_read_as_the_sum_that_they_are():
    terms = [
        Term(name="ce"),
        Term(name="kd", weight=2, temperature=4.0),
        Term(name="topkd", weight=0.5, warmup=20, via="ripsnet", ripsnet={"passes": 8, "on": True}),
    ]
    assert report.formula(terms) == (
        "ce + 2 kd (temperature 4) + "
        "0.5 topkd (warmup 20, via ripsnet, ripsnet.passes 8, ripsnet.on True)"
    )


def test_the_table(six):
    teacher, control, student = report.rows(collect_one(six))
    assert (teacher["run"], teacher["top1"]) == ("teacher: resnet20", "99.00 (1)")
    assert (control["run"], control["losses"]) == ("kd (baseline)", "ce + 2 kd")
    # 90, ..., 95 deviate by sqrt(17.5 / 5) from 92.5.
    assert (control["top1"], control["difference"]) == ("92.50 ± 1.87 (6)", "–")
    assert control["mean_of_last_10"] == "72.50 ± 1.87 (6)"
    assert control["best"] == "93.50 ± 1.87 (6)"
    assert control["agreement"] == "93.00 ± 0.00 (6)"
    assert control["topological_distance"] == "0.2250 ± 0.0187 (6)"
    assert (control["nll"], control["ece"]) == ("0.2000 ± 0.0000 (6)", "2.50 ± 0.00 (6)")
    # The gains deviate by sqrt(0.625 / 5) = 0.354 from 0.5; t for 5 degrees of freedom is 2.571.
    assert student["difference"] == "+0.50 [+0.13, +0.87] (6)"


@pytest.mark.parametrize(
    ("student", "difference", "said"),
    [
        (
            {0: 91.5},
            "+1.50 (1 seed)",
            "One seed: no statistical comparison of kd+topkd and kd is possible.",
        ),
        ({0: 90.0}, "0.00 (1 seed)", "kd+topkd is level."),
        ({7: 91.5}, "no common seed", "No common seed: no comparison"),
        ({0: 89.0, 1: 90.0}, "−1.00 (2 seeds)", "the spread of the differences is unknown"),
        ({0: 90.5, 1: 91.0, 2: 91.5}, "+0.00 [−1.24, +1.24] (3)", "No significant difference"),
        (
            {0: 95.0, 1: 96.1, 2: 96.9},
            "+5.00 [+4.75, +5.25] (3)",
            "Significant difference between",
        ),
    ],
)
def test_what_the_comparison_says(tmp_path, student, difference, said):
    runs = [result("kd", seed, 90.0 + seed) for seed in range(3)]
    put(tmp_path, *runs, *(result("kd+topkd", seed, top1) for seed, top1 in student.items()))
    study = collect_one(tmp_path)
    assert report.rows(study)[-1]["difference"] == difference.replace("+0.00 [", "0.00 [")
    (sentence,) = report.statements(study)
    assert said in sentence


def test_six_seeds_are_tested_in_two_ways(six):
    (sentence,) = report.statements(collect_one(six))
    # 62 of the 64 sign patterns of 0.25, 0.75, 0.5, 0, 1, 0.5 are less far from 0; 0 has no sign.
    assert "p = 0.018; sign-flip test, p = 0.062" in sentence
    assert "0.50 percentage points above on average over 6 seeds" in sentence


def test_several_comparisons_are_corrected(tmp_path):
    gains = {"kd+topkd": (0.4, 0.5, 0.6), "ce": (0.1, -0.2, 0.2)}
    runs = [result("kd", seed, 90.0) for seed in range(3)]
    runs += [
        result(variant, s, 90 + gain) for variant, of in gains.items() for s, gain in enumerate(of)
    ]
    study = collect_one(put(tmp_path, *runs))
    alone = study.compare("top1")["kd+topkd"].t_p
    corrected = next(line for line in report.statements(study) if "kd+topkd" in line)
    assert f"p = {2 * alone:.2g}" in corrected
    assert any("corrected for 2 comparisons (Holm)" in line for line in report.setting(study))


def test_markdown(six):
    lines = report.markdown(six).splitlines()
    assert lines[0] == "### digits"
    assert {line.count("|") for line in lines if line.startswith("|")} == {
        len(report.headings()) + 1
    }
    assert lines[2].startswith("| Run | Losses | Top-1 ↑, % | Difference to baseline")
    assert lines[4].startswith("| teacher: resnet20 |")
    assert lines[6].startswith("| kd+topkd | ce + 2 kd + 5 topkd (via ripsnet, ripsnet.passes 8) |")
    text = "\n".join(lines)
    assert "Evaluated on the test set at the last epoch" in text
    assert "Data digits, teacher resnet20, student resnet8x0.25, 2 epochs." in text
    assert "AMD EPYC, 2 threads" in text
    assert "commit unknown" in text
    assert "the term topkd carries 0.02 % of the gradient" in text
    assert "R² 0.02, below 0.5" in text


def test_a_validation_split_is_not_called_the_test_set(tmp_path):
    put(tmp_path, result("kd", 0, 90.0, eval_split="validation"))
    assert "Evaluated on the validation split" in report.markdown(tmp_path)


def test_a_metric_added_to_the_table_is_computed_stored_and_shown(
    six, tmp_path, monkeypatch, undrawn, capsys
):
    monkeypatch.setitem(
        METRICS,
        "brier",
        Metric("brier", "Brier score", "", 3, False, "a proper scoring rule", lambda made: 0.125),
    )
    put_files(six)
    (data, path), out = (DATA["digits"](), tmp_path / "new/kd+topkd/seed0"), tmp_path / "new"
    made = Predictions(torch.randn(9, 10), torch.randn(9, 4), data.test.target[:9])
    last = prediction_metrics(made)
    content = Result.model_validate(result("kd+topkd", 0, 90.0, last=last)).as_json()
    path.mkdir(parents=True)
    files.write_sealed(path / "result.json", content)
    assert files.read_sealed(path / "result.json")["last"]["brier"] == 0.125
    assert report.rows(collect_one(out))[-1]["brier"] == "0.125 (1)"
    assert "Brier score ↓" in report.markdown(out)
    page = Page(report.html(out)).text
    assert "Brier score ↓" in page
    assert "a proper scoring rule" in page
    print_results([content])
    shown = capsys.readouterr().out
    assert "Brier" in shown
    assert "0.125" in shown
    assert report.rows(collect_one(six))[-1]["brier"] == "–"  # runs from before


def test_terminal_shows_mean_deviation_and_findings_of_several_seeds(six, capsys):
    study = collect_one(six)
    print_results([run.result.as_json() for run in study.runs], report.findings(six, "digits"))
    lines = capsys.readouterr().out.splitlines()
    (mean,) = [line for line in lines if line.startswith("kd ") and "mean" in line]
    (spread,) = [line for line in lines if line.startswith("kd ") and "± std" in line]
    assert mean.split()[:3] == ["kd", "mean", "92.50"]
    assert spread.split()[:4] == ["kd", "±", "std", "1.87"]
    assert "Significant difference between kd+topkd and kd" in " ".join(lines)
    assert report.findings(put(six / "x", result("kd", 0, 9.0, recipe="one")), "one") == []


def test_a_result_is_written_as_it_is_read():
    content = result("kd+topkd", 0, 90.0) | {"processes": 1, "data_issues": {}, "files": {}}
    written = Result.model_validate(content).as_json()
    losses = [term["name"] for term in written.pop("losses")]
    assert losses == [term["name"] for term in content.pop("losses")]
    assert written == content


def test_a_result_says_where_gradients_were_compared_if_not_at_the_embedding():
    content = result("kd+topkd", 0, 90.0) | {"gradient_at": "backbone weights"}
    assert Result.model_validate(content).as_json()["gradient_at"] == "backbone weights"
    assert Result.model_validate(result("kd", 0, 90.0)).gradient_at == "embedding"


def test_the_section_on_gradients_names_their_place(tmp_path):
    put(tmp_path, result("kd", 0, 90.0))
    put(tmp_path, result("kd+topkd", 0, 90.0, gradient_at="backbone weights"))
    plain, named = sections.gradients(collect_one(tmp_path)).sentences
    assert plain.startswith("kd, last epoch, mean of 1 seed: ce ")
    assert named.startswith("kd+topkd, at the backbone weights, last epoch, mean of 1 seed: ce ")


def test_markdown_cannot_be_broken_by_names(tmp_path):
    hostile = result("kd", 0, 90.0, data="a|b\n| c", model="<script>x")
    text = report.markdown(put(tmp_path, hostile))
    assert "Data a\\|b \\| c" in text
    assert "<script" not in text


def test_terms_are_faint_below_a_thousandth_and_only_with_a_weight(tmp_path):
    shares = {"ce": 0.999, "kd": 0.001, "topkd": 0.0}
    silent = [CE, KD, TOPKD | {"weight": 0.0}]
    put(tmp_path, result("kd+topkd", 0, 90.0, gradient_share=shares, losses=silent))
    assert sections.faint_terms(collect_one(tmp_path)) == []
    put(tmp_path, result("kd+topkd", 1, 90.0, recipe="b", gradient_share=shares | {"kd": 0.0009}))
    warnings = sections.faint_terms(report.collect(tmp_path)[0])
    assert [re.search(r"the term (\w+) carries (\S+) %", w).groups() for w in warnings] == [
        ("kd", "0.09"),
        ("topkd", "0"),
    ]


def test_a_faint_term_is_named_by_its_label(tmp_path):
    labeled = [CE, KD, TOPKD | {"label": "added"}]
    shares = {"ce": 0.9, "kd": 0.0999, "added": 0.0001}
    put(tmp_path, result("kd+added", 0, 90.0, gradient_share=shares, losses=labeled))
    (warning,) = sections.faint_terms(collect_one(tmp_path))
    assert warning.startswith("In kd+added, the term added carries 0.01 % of the gradient")


def test_what_keeps_runs_from_being_compared_is_said(tmp_path):
    other = copy.deepcopy(result("kd+topkd", 0, 90.0))
    other["environment"]["torch"], other["teacher"]["hash"] = "2.9.0", "beef"
    study = collect_one(put(tmp_path, result("kd", 0, 90.0), other))
    said = " ".join(report.cautions(study))
    assert "have 2 different teachers" in said
    assert "differ in torch: 2.14.1 / 2.9.0" in said
    assert "no recipe.yaml" in said
    assert report.rows(study)[0]["top1"] == "99.00 ± 0.00 (2)"


def test_the_page_is_whole_and_needs_nothing_else(page):
    assert page.open == []
    assert ("html", "lang", "en") in page.attributes
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    styles = "".join(text for text in page.shown if "{" in text)
    assert "url(" not in styles
    assert "@import" not in styles
    assert "script" not in page.tags
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    linked = {
        value[1:] for _, name, value in page.attributes if name.endswith("href") and value[0] == "#"
    }
    assert linked <= set(ids)


def test_every_picture_is_there_and_described(page):
    # Accuracy and three terms, shares of two variants, three barcodes and their comparison.
    assert page.tags.count("svg") == 4 + 2 + 4
    assert page.tags.count("img") == 1 + 3  # persistence images, three maps
    described = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    described += [v for tag, name, v in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(described) == 14
    assert all(described)


def test_the_page_says_what_matters(page):
    for expected in (
        "Significant difference between kd+topkd and kd",
        "92.50 ± 1.87 (6)",
        "+0.50 [+0.13, +0.87] (6)",
        "the term topkd carries 0.02 % of the gradient",
        "R² 0.02 on 256 held-out clouds",
        "distance to the teacher, over all clouds of test images: kd 0.2250 ± 0.0187 (6)",
        "batch_size: 16",
        "AMD EPYC",
        "other classes",
        "For readers new to persistence",
    ):
        assert expected in page.text


def test_hostile_names_are_shown_and_not_obeyed(tmp_path, quick):
    name = '<script>alert("1")</script><img src=x onerror=alert(2)> $x_{$'
    run = result("kd+topkd", 0, 90.0, data=name, model=name)
    run["losses"], run["gradient_share"] = [CE, {"name": name}], {"ce": 0.5, name: 0.5}
    run["environment"]["processor"] = name
    control = result("kd", 0, 90.0) | {"variant": name.replace("/", "")}
    (tmp_path / "r").mkdir()
    for content in (run, control):
        path = tmp_path / "r" / "variant" / f"seed{id(content)}"
        path.mkdir(parents=True)
        files.write_sealed(path / "result.json", content)
        entry = {
            "test_top1": 1.0,
            "losses": {name: 1.0},
            "gradient_share": content["gradient_share"],
        }
        (path / "metrics.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    page = Page(report.html(tmp_path))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert name in page.text


def test_terms_that_end_or_begin_on_the_way_are_drawn_while_they_last(six, undrawn):
    put_files(six)
    for path in six.rglob("metrics.jsonl"):
        early, late = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        for kind in ("losses", "gradient_share"):
            early[kind] |= {"early": 0.5}
            late[kind] |= {"late": 0.5}
        path.write_text(json.dumps(early) + "\n" + json.dumps(late) + "\n", encoding="utf-8")
    page = Page(report.html(six))
    described = [value for _, name, value in page.attributes if name == "aria-label"]
    for variant in ("kd", "kd+topkd"):
        (shown,) = [
            text
            for text in described
            if text.startswith("share") and text.endswith(f"in {variant}")
        ]
        assert {"early", "late"} <= set(re.findall(r"\w+", shown))
    for term in ("early", "late"):
        assert f"loss {term} over the epochs of kd, kd+topkd" in described
    drawn = {
        picture.alt: picture.figure for picture in sections.training(collect_one(six)).pictures
    }
    for line in drawn["loss early over the epochs of kd, kd+topkd"].axes[0].lines:
        assert line.get_xdata().tolist() == [1]
        assert line.get_ydata().tolist() == [0.5]


def test_what_files_are_absent_for_is_left_out_and_said(six):
    page = Page(report.html(six))
    assert {"svg", "img"}.isdisjoint(page.tags)
    for line in ("No curves:", "No diagrams:", "No images:", "No maps:"):
        assert line in page.text
    assert "recipe.yaml" in page.text  # that it is absent


def test_a_recipe_without_teacher_has_no_topology(tmp_path):
    run = result("kd+topkd", 0, 99.0, losses=[CE], gradient_share={"ce": 1.0}, loss_metadata={})
    page = Page(report.html(put(tmp_path, {k: v for k, v in run.items() if k != "teacher"})))
    headings = [tag for tag in page.tags if tag == "h3"]
    assert len(headings) == 1  # training
    assert "No significant" not in page.text


def test_a_ripsnet_of_another_teacher_is_not_shown(six, undrawn):
    put_files(six)
    for path in six.rglob("result.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["teacher"]["hash"] = "another"
        files.write_sealed(path, {key: content[key] for key in content if key != files.SEAL})
    assert "no approximator of this teacher" in Page(report.html(six)).text


def test_a_broken_ripsnet_is_said(six, undrawn):
    (put_files(six) / "digits/ripsnet-1.safetensors").write_bytes(b"torn")
    assert "ripsnet-1.safetensors is skipped" in Page(report.html(six)).text


def test_clouds_hold_the_same_images_for_every_network(six):
    study = collect_one(put_files(six))
    chapter = sections.shape(study)
    teacher, control, student = (picture.figure.axes[0] for picture in chapter.pictures[:3])
    together = chapter.pictures[3].figure.axes[0].lines
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:16]
    examples = study.variants["kd"][0].examples
    for axes, line, name in zip((teacher, control), together, ("teacher", "student"), strict=False):
        deaths = rips(examples[name][order].double()).deaths
        expected = (deaths / deaths.mean()).sort().values.tolist()
        assert line.get_ydata().tolist() == pytest.approx(expected, rel=1e-6)
        ends = [segment[1, 0] for segment in axes.collections[0].get_segments()]
        assert ends == pytest.approx(expected[::-1], rel=1e-6)
    assert student.get_title(loc="left") == "kd+topkd, seed 0"


def test_a_page_is_rebuilt_only_when_its_inputs_change(six, quick, capsys):
    path = put_files(six) / "report.html"
    report.write_report(six, path, Progress())
    first = path.read_text(encoding="utf-8")
    assert first.endswith("</html>")
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    report.write_report(six, path, Progress())
    assert path.stat().st_mtime_ns == before
    assert "report.html is up to date: its inputs have not changed\n" in capsys.readouterr().err
    put(six, result("kd", 6, 90.0))
    report.write_report(six, path, Progress(quiet=True))
    assert path.read_text(encoding="utf-8") != first
