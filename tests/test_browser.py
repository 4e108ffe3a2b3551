"""Reports in Chromium, at the widths and color schemes that readers have."""

import json
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topkd.cli.app import app

ROOT = Path(__file__).parents[1]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

# A frame has the width that is asked for; the window of a headless browser has a least width.
WRAPPER = """<!doctype html><pre id="found"></pre>
<iframe id="frame" width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  let value;
  try {{ value = (() => {{ {script} }})(); }} catch (error) {{ value = String(error); }}
  found.textContent = JSON.stringify(value);
}};
</script>"""


COMMANDS = {
    "study": "study report studies/digits.yaml --results results/digits-study --to",
    "runs": "report results/cifar100/resnet20-resnet8 --out",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Makes pages from committed results by the commands of the documentation."""
    made = {}
    for name, words in COMMANDS.items():
        path = tmp_path_factory.mktemp("page") / "report.html"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            CliRunner().invoke(app, [*words.split(), str(path)], catch_exceptions=False)
        made[name] = path.read_text(encoding="utf-8")
    return made


@pytest.fixture
def browse(tmp_path):
    """Runs a script in a page, which it knows as ``page`` and ``view``; returns its result."""

    def run(page: str, script: str, width: int = 1600, *, dark: bool = False):
        file = tmp_path / "wrapper.html"
        wrapped = WRAPPER.format(width=width, page=escape(page, quote=True), script=script)
        file.write_text(wrapped, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        command = [CHROMIUM, *options, "--dump-dom", file.as_uri()]
        shown = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
        return json.loads(shown.partition('<pre id="found">')[2].partition("</pre>")[0])

    return run


@pytest.mark.parametrize("width", [420, 1600])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_is_never_scrolled_sideways(pages, browse, name, width):
    script = """
      const root = page.documentElement;
      return [view.innerWidth, root.scrollWidth - root.clientWidth, root.scrollHeight];"""
    shown, hidden, height = browse(pages[name], script, width)
    assert (shown, hidden) == (width, 0)
    assert height > 900


CONTRAST = """
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (node) => {
    for (; node; node = node.parentElement) {
      const color = view.getComputedStyle(node).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const words = (node) => [...node.childNodes].some((n) => n.nodeType === 3 && /\\w/.test(n.data));
  const found = [...page.body.querySelectorAll("*")]
    .filter((node) => !node.closest("svg, script, style") && words(node))
    .map((node) => {
      const pair = [view.getComputedStyle(node).color, paper(node)].map(light);
      const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
      return [ratio, `${node.tagName} ${node.textContent.trim().slice(0, 40)}`];
    });
  found.sort((a, b) => a[0] - b[0]);
  return [view.matchMedia("(prefers-color-scheme: dark)").matches, found.length, ...found[0]];
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_text_has_the_contrast_that_wcag_asks_for(pages, browse, name, dark):
    seen_dark, texts, least, where = browse(pages[name], CONTRAST, dark=dark)
    assert seen_dark == dark
    assert texts > 50
    assert least >= 4.5, where


def test_a_table_is_sorted_by_a_column(pages, browse):
    script = """
      const table = page.querySelector("table"), column = 2;
      const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
      const before = values();
      table.tHead.rows[0].cells[column].querySelector("button").click();
      const down = values();
      table.tHead.rows[0].cells[column].querySelector("button").click();
      return [before, down, values(), table.tHead.rows[0].cells[column].ariaSort];"""
    before, down, up, order = browse(pages["study"], script)
    numbers = [
        float(text.split()[0].replace("\u2212", "-")) for text in down if text[0] in "+\u2212"
    ]
    assert len(numbers) > 1
    assert numbers == sorted(numbers, reverse=True)
    assert sorted(before) == sorted(down) == sorted(up)
    assert up == [*reversed(down[: len(numbers)]), *down[len(numbers) :]]  # absent values last
    assert order == "ascending"


def test_a_variant_can_be_hidden(pages, browse):
    script = """
      const item = page.querySelector("#variants li"), box = item.querySelector("input");
      const parts = [...page.querySelectorAll("[data-series]")];
      const isShown = (part) => view.getComputedStyle(part).display !== "none";
      const shown = (own) => parts.filter((part) =>
        (part.dataset.series === item.dataset.name) === own && isShown(part)).length;
      const before = [shown(true), shown(false)];
      box.click();
      return [before, [shown(true), shown(false)]];"""
    before, after = browse(pages["study"], script)
    assert min(before) > 0
    assert after == [0, before[1]]
