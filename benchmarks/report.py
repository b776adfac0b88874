"""How long a report takes to make, and to open: eleven tasks, five rounds, thirty layers.

    python benchmarks/report.py [RUN] [--picture FILE]

Makes the report of RUN (default: a folder that is written here, of the same shape as a run's) and opens it in Chromium
through Playwright. Both wall time and the time of the processor: they are the same on a machine that does nothing else.
--picture writes verdict and first charts as a PNG file, as the README shows them.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from playwright.sync_api import sync_playwright

from manyshot.report_command import write_report
from report_helpers import FakeRun, task_names

PATIENCE = 120_000
DRAWN = """async () => {
  while (document.documentElement.dataset.drawn !== "yes") await new Promise((done) => setTimeout(done, 5));
  return performance.now();
}"""
ALL = """async () => {
  const began = performance.now();
  for (const chart of document.querySelectorAll(".panel:not([hidden]) > .chart")) {
    chart.scrollIntoView();
    while (!chart.querySelector("svg")) await new Promise((done) => setTimeout(done, 5));
  }
  return performance.now() - began;
}"""


# not in the picture, which has the verdict, losses, weights
LEFT_OUT = "nav, #models, #tasks, .data, #kept, #drift, #rounds, #scores, #examples, #guards, #costs, #recipe, footer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.run or fake_run(Path(scratch) / "eleven")
        wall, busy = time.perf_counter(), time.process_time()
        page = write_report([folder], Path(scratch) / "report").html
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        print(f"{platform.machine()}, Python {platform.python_version()}")
        print(
            f"made in {wall:.2f} s, of the processor {busy:.2f} s; report.html has {page.stat().st_size / 1e6:.2f} MB"
        )
        open_page(page, asked.picture)


def fake_run(folder: Path) -> Path:
    return FakeRun(folder, task_names(11), rounds=5, layers=30, num_test=200).write()


def open_page(path: Path, picture: Path | None) -> None:
    """Until the page says that it is drawn, then every chart that is further down."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), timeout=PATIENCE)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE)
        before = busy_seconds()
        page.goto(path.as_uri())
        opened = page.evaluate(DRAWN) / 1000
        busy = busy_seconds() - before
        print(f"Chromium {browser.version}: opened in {opened:.2f} s, of the processor {busy:.2f} s (all processes)")
        rest = page.evaluate(ALL) / 1000
        print(f"all charts drawn {rest:.2f} s later, of the processor {busy_seconds() - before - busy:.2f} s")
        if picture is not None:
            page.evaluate(
                f"document.querySelectorAll('{LEFT_OUT}').forEach((one) => {{ one.style.display = 'none'; }})"
            )
            page.screenshot(path=picture, full_page=True)
            print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")
        browser.close()


def busy_seconds() -> float:
    """Seconds of processor time that the browser, as all of what this process has started, has taken."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(one.user + one.system for one in times))


if __name__ == "__main__":
    main()
