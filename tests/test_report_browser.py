"""The report in a real browser, at a desk's and at a phone's width. Oracles: the browser's own measures of the page, and its pixels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_kit import cell, comparison_of, run_of, sequence_of

from dsfreeze.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is on the PATH (Debian: apt-get install chromium)")
DESK, PHONE = (1280, 900), (390, 844)
#: Lets the page be measured: what it fetches, what its policy stops, what goes beyond its width, and errors.
PROBE = """<script>
const told = {errors: [], stopped: []};
addEventListener('error', event => told.errors.push(event.message));
addEventListener('securitypolicyviolation', event => told.stopped.push(event.blockedURI));
addEventListener('load', () => {
  const width = document.documentElement.clientWidth;
  const inBox = node => { for (; node; node = node.parentElement) if (/auto|hidden/.test(getComputedStyle(node).overflowX)) return true; };
  told.width = width;
  told.scroll = document.documentElement.scrollWidth;
  told.beyond = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 1 && !inBox(e)).map(e => e.tagName);
  told.fetched = performance.getEntriesByType('resource').map(e => e.name);
  told.figures = [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width);
  told.text = Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height));
  told.ink = getComputedStyle(document.querySelector('svg text')).fill;
  document.body.innerHTML = '';
  document.body.textContent = 'TOLD' + JSON.stringify(told) + 'END';
});
</script>"""


def browse(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [BROWSER, *flags, *words], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ":CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all kinds of sections, and names as long as names get."""
    folder = tmp_path_factory.mktemp("report")
    long = "a-name-of-a-run-that-says-all-of-it-" * 4
    for seed in (1, 2):
        for fraction in (0.25, 0.5):
            words = (f"freeze.fraction={fraction}", f"train.seed={seed}", f"data.train={'long/' * 20}{long}.jsonl")
            run_of(folder / "runs" / f"{long}{fraction}-{seed}", *words, accuracy=fraction + seed / 10)
    run_of(folder / "runs" / "killed", ended=False)
    methods = [cell(f"method-{number}", seed, 60.0 + number) for number in range(9) for seed in (1, 2)]
    comparison_of(
        folder / "runs" / "grid", *methods, cell("bitfit", 1, None, status="impossible", reason="no biases " * 30)
    )
    sequence_of(folder / "runs" / "tasks2")
    write_report([folder / "runs"], folder / "report.html", "A report")
    return folder / "report.html"


def measured(page: Path, tmp_path: Path, size: tuple[int, int], *words: str) -> dict:
    """The page in a frame of that size (a window has a least width), without its policy, which forbids the probe."""
    text = page.read_text(encoding="utf-8")
    open_page, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, text)
    assert count == 1
    copy = tmp_path / "probed.html"
    copy.write_text(open_page, encoding="utf-8")
    shell = tmp_path / "frame.html"
    shell.write_text(
        f"<body style='margin:0'><iframe src='probed.html' style='border:0' width={size[0]} height={size[1]}></iframe><script>"
        "const wait = setInterval(() => { const body = document.querySelector('iframe').contentDocument.body;"
        "if (body?.textContent.startsWith('TOLD')) { clearInterval(wait); document.body.textContent = body.textContent } }, 50)"
        "</script>"
    )
    words = ("--allow-file-access-from-files", "--virtual-time-budget=8000", *words, "--dump-dom")
    done = browse(tmp_path, *words, shell.as_uri())
    found = re.search("TOLD(.*)END", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_the_page_fits_and_fetches_nothing(page: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    told = measured(page, tmp_path, size)
    assert told["width"] == told["scroll"] == size[0]
    assert told["beyond"] == []
    assert told["fetched"] == told["errors"] == told["stopped"] == []
    assert len(told["figures"]) == 5 + 3 + 4 + 1
    assert min(told["figures"]) >= 300
    assert told["text"] >= 8, "text of figures can be read"


@pytest.mark.slow
def test_the_dark_page_has_light_ink(page: Path, tmp_path: Path) -> None:
    """Oracle: the colour that the browser gives to a figure's text, in either scheme."""
    light = measured(page, tmp_path, DESK)["ink"]
    dark = measured(page, tmp_path, DESK, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")["ink"]
    assert (light, dark) == ("rgb(27, 31, 36)", "rgb(232, 234, 237)")


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESK, PHONE])
def test_the_screenshot_shows_the_page(page: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    """Oracle: pixels: mostly paper, some ink, and the blue of bars; the page itself, its policy in force."""
    from matplotlib import image

    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--window-size={size[0]},{3 * size[1]}", f"--screenshot={shot}", page.as_uri())
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[0] == 3 * size[1]
    luminance = pixels.mean(axis=2)
    assert 0.5 < (luminance > 0.95).mean() < 0.995
    assert 0.002 < (luminance < 0.4).mean() < 0.3
    blue = (pixels[..., 2] > pixels[..., 0] + 0.3) & (pixels[..., 2] > 0.5)
    assert blue.mean() > 0.001
