"""The page of a study says what the analysis says; tables stand beside those of papers."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy import stats
from typer.testing import CliRunner

from topkd._io import files
from topkd.cli.app import app
from topkd.config import study as studies
from topkd.reporting.plots.forest import Difference, forest
from topkd.reporting.plots.interactive import Chart
from topkd.reporting.sections import fixed
from topkd.studies import benchmark, figures, sentences, table
from topkd.studies.analysis import compare
from topkd.studies.collect import collect, primary_metric
from topkd.studies.overall import over_settings
from topkd.studies.plan import Place
from topkd.studies.report import html

ODD = 'r&d <b>50%</b> "x" _$'
STUDY = {
    "recipe": "digits",
    "baseline": "kd",
    "variants": {
        "kd": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
        "ce": [{"name": "ce"}],
        "edges": {"add": [{"name": "edge_matching", "share": 0.1}]},
        ODD: {"add": [{"name": "rkd", "share": 0.1}]},
    },
    "settings": {"easy": {}, "hard": {"optimizer.lr": 0.02}},
    "seeds": "0-4",
    "primary": {"metric": "top1", "margin": 0.5},
}
BASE = [90.0, 91.5, 90.5, 92.0, 91.0]
GAINS = {
    "kd": [0.0] * 5,
    "ce": [-4.0, -4.2, -3.9, -4.1, -4.0],
    "edges": [1.0, 1.2, 0.9, 1.1, 1.0],
    ODD: [0.1, -0.1, 0.0, 0.05, -0.05],
}


def measured(seeds=range(5), variants=GAINS, settings=("easy", "hard")):
    """Setting -> variant -> seed -> top-1."""
    return {
        setting: {
            variant: {seed: BASE[seed] + GAINS[variant][seed] - 10 * number for seed in seeds}
            for variant in variants
        }
        for number, setting in enumerate(settings)
    }


def result(job, top1, **changes):
    terms = [term.title for term in job.recipe.losses]
    return {
        "recipe": job.recipe.name,
        "recipe_hash": job.recipe.hash,
        "variant": job.recipe.main,
        "seed": job.seed,
        "model": "resnet8x0.25",
        "data": "digits",
        "losses": [term.model_dump(mode="json") for term in job.recipe.losses],
        "epochs": 2,
        "eval_split": "test",
        "last": {"top1": top1, "top5": 100.0, "nll": 0.2, "ece": 2.5},
        "mean_of_last_10": top1,
        "best": {"epoch": 1, "top1": top1 + 1},
        "gradient_share": dict.fromkeys(terms, 1 / len(terms)),
        "train_seconds": 5.0 + job.seed,
        "environment": {"topkd": "0.1.0", "commit": "abc1234", "processor": "AMD EPYC"},
        "teacher": {"model": "resnet20", "hash": "fdee", "top1": 99.0},
        "teacher_similarity": {"agreement": 93.0, "kl": 0.2, "topological_distance": 0.2},
    } | changes


@pytest.fixture
def made(tmp_path):
    """Makes a study with results on disk: the finished jobs and their place."""

    def make(values=None, *, changes=(), curves=False, **replaced):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        plan, place = studies.load(tmp_path / "study.yaml", changes), Place(tmp_path / "runs")
        for job in plan.jobs():
            found = (values or measured()).get(job.setting, {}).get(job.variant, {})
            if job.seed not in found:
                continue
            folder = place.run(job)
            folder.mkdir(parents=True)
            files.write_sealed(folder / "result.json", result(job, found[job.seed], **replaced))
            if curves:
                entries = [
                    {"epoch": e, "test_top1": 30.0 * e, "losses": {}, "gradient_share": {}}
                    for e in (1, 2)
                ]
                lines = "".join(json.dumps(entry) + "\n" for entry in entries)
                (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        return collect(plan, place), place

    return make


class Page(HTMLParser):
    """What is shown without JavaScript: text, tables and hover values of figures."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tables, self.titles, self.tags, self.inside = "", [], [], [], []
        self.loaded = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [v for k, v in attributes.items() if k in ("src", "href", "srcset")]
        if tag in ("meta", "use", "path", "rect"):
            self.tags.append(tag)
            return
        self.inside.append(tag)
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self.inside or "style" in self.inside:
            return
        if "title" in self.inside and "svg" in self.inside:
            self.titles.append(data)
        elif "td" in self.inside or "th" in self.inside:
            self.tables[-1][-1][-1] += data
        self.text += " ".join(data.split()) + " "


def signed(value):
    return fixed(value, "+.2f")


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures of a page empty, for tests that read its text."""
    monkeypatch.setattr(Chart, "svg", lambda chart, *, prefix, alt: f'<svg id="{prefix}"></svg>')


# --- The page ------------------------------------------------------------------------------------


def test_the_page_has_the_numbers_of_the_analysis(undrawn, made):
    study, place = made()
    page = Page(html(study, place))
    assert "All 40 jobs are done." in page.text
    summary = {row[0]: row[1:] for row in page.tables[0]}
    assert summary["Variant"] == ["easy", "hard", "Mean over 2 settings"]
    for column, setting in enumerate(("easy", "hard")):
        for found in compare(setting, measured()[setting], "kd", margin=0.5):
            low, high = map(signed, found.interval)
            cell = summary[found.variant][column]
            assert cell.startswith(f"{signed(found.differences.mean)} [{low}, {high}]")
            assert cell.endswith(sentences.SYMBOLS[found.verdict])
            (row,) = [r for r in page.tables[1 + 3 * column] if r[0] == found.variant]
            assert row[2].lstrip("+").startswith(signed(found.differences.mean).lstrip("+"))
            assert row[2].endswith(f" [{low}, {high}]")
            assert row[5] == f"{sentences.SYMBOLS[found.verdict]} {found.verdict}"


def test_findings_come_first_in_a_sentence_for_each_setting(made):
    study, place = made()
    ce, edges, _ = study.comparisons("easy")
    low, high = edges.interval
    text = sentences.finding(study, "easy")
    assert text == (
        f"easy: edges is better than kd by 1.04 points (95 % {low:.2f} to {high:.2f}, n = 5); "
        f"ce is worse than kd by 4.04 points (95 % {-ce.interval[1]:.2f} to {-ce.interval[0]:.2f}, "
        "n = 5); "
        "1 variant shows no difference that matters."
    )
    page = Page(html(study, place))
    assert page.text.index(text) < page.text.index("Mean over 2 settings")


def test_a_figure_shows_every_seed_on_hover(made):
    study, place = made(changes=("settings={easy: {}}",))
    titles = Page(html(study, place)).titles
    for seed, gain in enumerate(GAINS["edges"]):
        assert f"edges, seed {seed}: {gain:+.2f}" in titles
    assert any(re.fullmatch(r"edges: \+1\.04 \[.*\]: ▲ better", title) for title in titles)


def test_special_characters_are_text(made):
    study, place = made(changes=("settings={easy: {}}",))
    written = html(study, place)
    page = Page(written)
    assert "b" not in page.tags
    assert "<b>" not in written
    assert ODD in [row[0] for row in page.tables[0]]
    assert ODD in page.text
    assert any(title.startswith(f"{ODD}, ") for title in page.titles)


def test_a_page_is_one_file_that_is_readable_without_scripts(made):
    study, place = made(changes=("settings={easy: {}}",), curves=True)
    written = html(study, place)
    page = Page(written)
    assert not [url for url in page.loaded if not url.startswith("#")]
    assert set(re.findall(r"https?://[^\"' <]+", written)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "url(http" not in written
    assert "button" not in page.tags  # made by the script, which would have to answer it
    assert "input" not in page.tags
    ids = re.findall(r'\bid="([^"]+)"', written)
    assert len(ids) == len(set(ids))
    assert written == html(study, place)


def test_learning_curves_need_metrics_of_epochs(made):
    study, place = made(changes=("settings={easy: {}}",), curves=True)
    page = Page(html(study, place))
    assert "edges, epoch 2: 60.00 (mean of 5)" in page.titles
    assert "No learning curves" not in page.text


def test_results_alone_leave_out_the_curves_and_say_so(undrawn, made):
    study, place = made()
    page = Page(html(study, place))
    assert page.text.count("No learning curves: there is no metrics.jsonl") == 2
    assert "Learning curves" not in page.text


def test_an_incomplete_study_says_so_first(undrawn, made):
    values = measured()
    del values["hard"]["kd"], values["easy"]["edges"][4]
    study, place = made(values)
    started = next(j for j in study.plan.jobs() if (j.variant, j.setting) == ("kd", "hard"))
    place.run(started).mkdir(parents=True)
    page = Page(html(study, place))
    first = "Incomplete: 34 of 40 jobs are done; 1 of the others was started."
    assert page.text.index(first) < page.text.index("easy (19 of 20 jobs): edges is better")
    assert "hard (15 of 20 jobs): no run of the baseline kd is finished." in page.text
    assert len(page.tables) == 5  # no table over settings, as only one has comparisons
    assert "Mean over" not in page.text


def test_selected_variants_are_judged_as_in_the_whole_study(undrawn, made):
    study, place = made()
    part = collect(study.plan.only(["edges"]), place)
    for setting in study.plan.settings:
        whole = {each.variant: each for each in study.comparisons(setting)}
        (alone,) = part.comparisons(setting)
        assert (alone.interval, alone.p) == (whole["edges"].interval, whole["edges"].p)
    note = "Selected: 1 of the 3 variants besides kd."
    assert note in Page(html(part, place)).text
    assert note not in Page(html(study, place)).text


def test_variants_that_are_not_finished_do_not_narrow_the_intervals_of_others(made):
    values = measured()
    del values["easy"]["ce"]
    study, _ = made(values)
    (edges,) = [each for each in study.comparisons("easy") if each.variant == "edges"]
    pairs = np.array(edges.differences.values)
    found = stats.ttest_1samp(pairs, 0.0).confidence_interval(1 - 0.05 / 3)
    assert edges.interval == pytest.approx((found.low, found.high))


def test_a_table_has_a_row_for_what_is_missing(made):
    values = measured()
    del values["easy"]["ce"], values["hard"]["kd"]
    study, _ = made(values)
    found = {(row["setting"], row["variant"]): row for row in table.rows(study)}
    assert len(found) == 8
    assert found["easy", "ce"]["verdict"] == "not finished"
    assert found["hard", "kd"]["verdict"] == "not finished"
    assert found["hard", "edges"]["verdict"] == "baseline not finished"
    assert found["hard", "edges"]["n"] == 5
    for form in table.FORMATS.values():
        assert form(study).count("not finished") == 5


def test_metrics_that_were_not_measured_are_not_called_unfinished(undrawn, made):
    study, _ = made(
        changes=("primary={metric: nll}",), last={"top1": 90.0, "top5": 99.0, "ece": 1.0}
    )
    with pytest.raises(ValueError, match="study: the runs of the baseline kd have no nll"):
        table.rows(study)
    assert "easy: the runs of the baseline kd have no nll." in sentences.finding(study, "easy")


def test_a_metric_of_the_teacher_needs_a_teacher(tmp_path):
    tree = STUDY | {"recipe": "digits/teacher", "primary": {"metric": "agreement"}}
    tree["variants"] = {"kd": [{"name": "ce"}]}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    plan = studies.load(tmp_path / "alone.yaml")
    with pytest.raises(ValueError, match="agreement cannot be computed without a teacher"):
        primary_metric(plan)


def test_results_of_different_teachers_are_pointed_out(undrawn, made, tmp_path, monkeypatch):
    study, place = made()
    other = {"model": "resnet20", "hash": "abab", "top1": 98.0}
    job = study.plan.jobs()[0]
    files.write_sealed(place.run(job) / "result.json", result(job, 90.0, teacher=other))
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["study", "table", "study.yaml", "--out", "runs"])
    assert "easy: These runs have 2 different teachers." in shown.stderr


def test_a_copied_result_is_no_other_seed(made):
    study, place = made()
    first, second = study.plan.jobs()[0], study.plan.jobs()[4]
    assert (first.variant, second.variant, second.seed) == ("kd", "kd", 1)
    content = (place.run(first) / "result.json").read_bytes()
    (place.run(second) / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"seed1/result\.json is the result of seed 0"):
        collect(study.plan, place)


def test_folders_of_results_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="--results: there is no folder .*typo"):
        Place(tmp_path, [tmp_path / "typo"])


def test_one_seed_decides_nothing(undrawn, made):
    study, place = made(measured(seeds=[0]), changes=("seeds=0",))
    page = Page(html(study, place))
    sentence = "easy: 3 variants are undecided (more seeds are needed to see the spread"
    assert sentence in page.text
    assert all(row[1].endswith(" ?") for row in page.tables[0][1:])


def test_without_a_margin_there_is_no_band(undrawn, made):
    study, place = made(changes=("primary={metric: top1}",))
    text = Page(html(study, place)).text
    assert "shaded" not in text
    assert "1 variant is undecided (about" in text
    with_margin = collect(studies.load(place.out.parent / "study.yaml"), place)
    assert "Differences below ±0.5 (shaded)" in Page(html(with_margin, place)).text


def test_no_result_is_one_line(made):
    study, place = made({"easy": {}})
    with pytest.raises(ValueError, match="study: no job is finished, so there is no report"):
        html(study, place)


def test_runs_on_different_processors_are_pointed_out(undrawn, made):
    study, place = made()
    job = study.plan.jobs()[0]
    other = {"topkd": "0.1.0", "commit": "abc1234", "processor": "Apple M4"}
    path = place.run(job) / "result.json"
    files.write_sealed(path, result(job, 90.0, environment=other))
    text = Page(html(collect(study.plan, place), place)).text
    note = "These runs differ in processor: Apple M4 (1 run), AMD EPYC (19 runs)."
    assert text.count(note) == 1
    assert text.count("abc1234") == 2


def test_an_altered_history_is_refused(made):
    study, place = made(curves=True, files={"metrics.jsonl": "0" * 64})
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        html(study, place)


def test_lower_is_better_for_losses(made):
    study, place = made(changes=("primary={metric: nll}",))
    for results in study.results.values():
        for seed, each in results.items():
            each["last"]["nll"] = each["last"]["top1"] + seed / 100
    text = sentences.finding(study, "easy")
    assert re.search(r"ce is better than kd by 4\.0400 nats \(95 % 3\.\d{4} to 4\.\d{4}, n", text)
    assert "edges is worse than kd by 1.0400 nats" in text


def test_the_command_writes_the_page(undrawn, made, tmp_path, monkeypatch):
    made()
    monkeypatch.chdir(tmp_path)
    command = ["study", "report", "study.yaml", "--out", "runs", "--to", "page.html"]
    CliRunner().invoke(app, command, catch_exceptions=False)
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "edges is better than kd" in Page(written).text
    with pytest.raises(ValueError, match="study: no job is finished"):
        CliRunner().invoke(app, [*command, "seeds=7"], catch_exceptions=False)


# --- Figures -------------------------------------------------------------------------------------


def test_a_forest_plot_draws_what_it_is_given():
    rows = [
        Difference("a", 0.5, (0.2, 0.8), {"seed 0": 0.4, "seed 1": 0.6}, "better"),
        Difference("b", -0.1, None, {"seed 0": -0.1}, "undecided"),
        Difference("c", 0.0, (-50.0, 50.0), {"seed 0": -0.2, "seed 1": 0.2}, "undecided"),
    ]
    (axes,) = forest(rows, title="t", xlabel="points", margin=0.3).figure.axes
    drawn = [line.get_xdata() for line in axes.lines]
    assert [list(x) for x in drawn if len(x) == 2 and list(x) != [0, 0]][:2] == [
        [0.4, 0.6],
        [0.2, 0.8],
    ]
    low, high = axes.get_xlim()
    assert low > -5  # one wide interval does not squeeze the others; arrows show that it goes on
    assert high < 5
    markers = [line.get_marker() for line in axes.lines]
    assert (markers.count("<"), markers.count(">")) == (1, 1)
    assert {text.get_text() for text in axes.texts} >= {"a", "better", "b", "undecided"}
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (-0.3, 0.3)


def test_an_interval_far_from_zero_has_no_arrow():
    row = Difference("a", 5.0, (4.0, 6.0), {"seed 0": 4.5, "seed 1": 5.5}, "better")
    (axes,) = forest([row], title="t", xlabel="points").figure.axes
    assert not {"<", ">"} & {line.get_marker() for line in axes.lines}


# --- Means over settings -------------------------------------------------------------------------


def test_seeds_are_averaged_over_settings_first():
    """A t-test of the averages, as the runs of a seed may be correlated over settings."""
    values = measured()
    found = {s: compare(s, values[s], "kd") for s in values}
    for average in over_settings(found):
        parts = [
            e.differences.values for s in found for e in found[s] if e.variant == average.variant
        ]
        test = stats.ttest_1samp(np.mean(parts, axis=0), 0.0)
        interval = test.confidence_interval(1 - 0.05 / 3)
        assert average.mean == pytest.approx(np.mean(parts))
        assert average.interval == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_intervals_of_means_over_settings_cover_where_settings_are_correlated(correlation):
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        common = generator.normal(0, math.sqrt(correlation), 5)
        found = {}
        for name in "abc":
            x = common + generator.normal(0, math.sqrt(1 - correlation), 5)
            values = {"kd": dict.fromkeys(range(5), 0.0), "new": dict(enumerate(x.tolist()))}
            found[name] = compare(name, values, "kd")
        low, high = over_settings(found)[0].interval
        covered += low <= 0 <= high
    assert abs(covered / 400 - 0.95) <= 0.022  # twice the standard error of 400 trials


def test_the_same_runs_three_times_decide_no_more_than_once():
    values = {"kd": {0: 80.0, 1: 81.0, 2: 82.0}, "new": {0: 80.3, 1: 81.8, 2: 82.4}}
    (once,) = compare("a", values, "kd")
    (thrice,) = over_settings({name: compare(name, values, "kd") for name in "abc"})
    assert thrice.interval == pytest.approx(once.interval)


def apart(values):
    """The same differences, with seeds that no two settings share."""
    return {
        setting: {v: {s + 10 * number: x for s, x in runs.items()} for v, runs in variants.items()}
        for number, (setting, variants) in enumerate(values.items())
    }


def test_the_mean_over_settings_without_common_seeds_is_welch_and_satterthwaites():
    values = apart(measured())
    found = {s: compare(s, values[s], "kd") for s in values}
    few = {"ce": {10: 70.0, 11: 79.0, 12: 75.0}}
    found["hard"] = compare("hard", values["hard"] | few, "kd")
    for average in over_settings(found):
        parts = [e for s in found for e in found[s] if e.variant == average.variant]
        variances, freedoms, means = [], [], []
        for part in parts:
            d = part.differences.values
            mean = sum(d) / len(d)
            means.append(mean)
            variances.append(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d))
            freedoms.append(len(d) - 1)
        total = sum(variances)
        freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
        half = stats.t.ppf(1 - 0.05 / 3 / 2, freedom) * math.sqrt(total) / 2
        assert average.mean == pytest.approx(sum(means) / 2)
        assert average.interval == pytest.approx((average.mean - half, average.mean + half))


def test_of_two_equal_settings_the_interval_is_welchs_t_interval():
    """Half the difference of one sample and minus another is a mean over two settings."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(1, 1, 6), generator.normal(0.5, 3, 9)
    found = {
        name: compare(
            name,
            {"kd": dict.fromkeys(range(s, s + len(x)), 0.0), "new": dict(enumerate(x, s))},
            "kd",
        )
        for s, name, x in ((0, "a", a.tolist()), (50, "b", b.tolist()))
    }
    (average,) = over_settings(found)
    welch = stats.ttest_ind(a, -b, equal_var=False).confidence_interval(0.95)
    assert average.interval == pytest.approx((welch.low / 2, welch.high / 2))


def test_intervals_of_means_over_settings_cover_with_few_seeds():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        found = {}
        for s, name, spread in ((0, "a", 1.0), (3, "b", 1.5), (6, "c", 2.0)):
            x = generator.normal(0, spread, 3).tolist()
            values = {"kd": dict.fromkeys(range(s, s + 3), 0.0), "new": dict(enumerate(x, s))}
            found[name] = compare(name, values, "kd")
        low, high = over_settings(found)[0].interval
        covered += low <= 0 <= high
    assert covered / 150 >= 0.914  # 0.95, less twice the standard error of 150 trials


def test_a_setting_without_a_known_spread_leaves_the_mean_undecided():
    easy = compare("easy", measured()["easy"], "kd")
    hard = compare("hard", {"kd": {0: 80.0}, "edges": {0: 85.0}}, "kd")
    (average,) = over_settings({"easy": easy, "hard": hard})  # ce is missing in a setting
    assert (average.variant, average.interval, average.verdict) == ("edges", None, "undecided")


# --- The layout of benchmarks --------------------------------------------------------------------


def test_a_benchmark_has_settings_as_columns_and_networks_above(made):
    study, _ = made()
    lines = benchmark.FORMATS["markdown"](study).splitlines()
    assert lines[0] == "| top-1 ↑, %: mean ± std (n) | easy | hard |"
    names = [line.split(" | ")[0] for line in lines[2:]]
    assert names[:4] == ["| teacher", "| student", "| kd", "| edges"]
    assert lines[2] == "| teacher | 99.00 (1) | 99.00 (1) |"
    assert all(re.search(r"\(\d+\)", cell) for line in lines[2:] for cell in line.split("|")[2:-1])
    latex = benchmark.FORMATS["latex"](study)
    assert latex.count(r"\midrule") == 2
    assert r"r\&d $<$b$>$50\%" in latex


def test_formats_of_a_benchmark_have_the_same_numbers(made):
    study, _ = made()
    entries = json.loads(benchmark.FORMATS["json"](study))
    table = {
        row["method"]: row for row in csv.DictReader(io.StringIO(benchmark.FORMATS["csv"](study)))
    }
    for entry in entries:
        row = table[entry["method"]]
        assert float(row[f"{entry['setting']} mean"]) == entry["mean"]
        assert int(row[f"{entry['setting']} n"]) == entry["n"]
    (edges,) = [e for e in entries if (e["method"], e["setting"]) == ("edges", "easy")]
    values = list(measured()["easy"]["edges"].values())
    assert edges["mean"] == pytest.approx(np.mean(values))
    assert edges["std"] == pytest.approx(np.std(values, ddof=1))


def test_the_best_is_bold_only_where_it_is_decided(made):
    values = measured()
    values["hard"]["edges"] = {0: 80.1, 1: 81.4, 2: 90.0, 3: 82.0, 4: 81.0}
    study, _ = made(values)
    best = {(e["method"], e["setting"]): e["best"] for e in json.loads(benchmark.as_json(study))}
    assert [key for key, is_best in best.items() if is_best] == [("edges", "easy")]
    (line,) = [x for x in benchmark.FORMATS["markdown"](study).splitlines() if "edges" in x]
    mean = np.mean(list(values["easy"]["edges"].values()))
    assert line.startswith(f"| edges | **{mean:.2f} ± ")
    assert line.count("**") == 2


def test_a_missing_result_is_a_dash(made):
    values = measured()
    del values["hard"]["edges"]
    study, _ = made(values)
    (line,) = [x for x in benchmark.FORMATS["markdown"](study).splitlines() if "edges" in x]
    assert line.endswith(" | – |")


@pytest.mark.parametrize(
    ("place", "expected"),
    [("embedding", "at"), ("backbone weights", "at, at the backbone weights")],
)
def test_gradients_that_were_compared_at_the_weights_are_marked(tmp_path, place, expected):
    found = SimpleNamespace(gradient_share={"ce": 0.5, "at": 0.5}, gradient_at=place)
    chart, _ = figures.shares({"at": {0: SimpleNamespace(result=found)}})
    (axes,) = chart.figure.axes
    assert [text.get_text() for text in axes.texts] == [expected]
