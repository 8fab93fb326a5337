"""Take the screenshots of the MLflow pages: ``python docs/screenshots.py WORKSPACE --out FOLDER``.

Needs Debian's ``chromium`` and ``chromium-driver`` and the package ``selenium``. WORKSPACE must
hold a finished recipe run; the newest is taken unless ``--run ID`` names another, and all pages unless ``--only NAME``
names some. Pages are photographed once their tables and charts are drawn.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.tracking import Store, resolve
from toolkit.tracking.client import connect
from toolkit.tracking.history import recipe_run, recipe_runs
from toolkit.tracking.ui import free_port, serving
from toolkit.workspace import Workspace

SIZE = (1600, 1000)
DRAWN_S = 90
"""How long a page may take to draw on a busy machine."""

SETTLE_S = 3
"""Time for a chart's animation after its first line is there."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    f"--window-size={SIZE[0]},{SIZE[1]}",
)

CHART = ".js-plotly-plot .main-svg"

TIDY = """
const style = document.createElement("style");
style.textContent = ".modebar { display: none !important }";
document.head.append(style);
const close = document.querySelector('[data-component-id="mlflow.assistant.chat_panel.close"]');
if (close) close.click();
"""
"""Hides the charts' tool bars and closes the assistant's panel."""

EXPAND = """
const row = document.querySelector('.ag-row button, .ag-row [role="button"]');
if (row) row.click();
"""
"""Opens the newest recipe run in the table, so that its steps are seen."""


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(_program("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        sys.exit(f"{name} is missing: apt-get install -y chromium chromium-driver")
    return found


def photograph(driver: Any, url: str, text: str, chart: bool, file: Path) -> None:
    """Open ``url``, wait until ``text`` and perhaps a chart are there, and save the page."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get("about:blank")  # the UI is one page: only a fresh load draws it from the start
    driver.get(url)
    wait = WebDriverWait(driver, DRAWN_S)
    wait.until(lambda d: text in d.find_element(By.TAG_NAME, "body").text)
    if chart:
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, CHART))
    driver.execute_script(TIDY)
    if not chart:
        driver.execute_script(EXPAND)
    time.sleep(SETTLE_S)
    driver.save_screenshot(str(file))
    print(f"{file}: {url}")


def pages(store: Store, run_id: str | None = None) -> Iterator[tuple[str, str, str, bool]]:
    """File name, path of the page, a text on it, and whether it has a chart."""
    runs = [recipe_run(store, run_id).run] if run_id else recipe_runs(store, limit=2)
    if not runs:
        sys.exit(f"{store.shown} holds no recipe run")
    newest = recipe_run(store, runs[0].run_id)
    experiment = connect(store).get_run(runs[0].run_id).info.experiment_id
    yield "mlflow-experiment", f"experiments/{experiment}/runs", runs[0].name, False
    yield "mlflow-recipe-run", f"experiments/{experiment}/runs/{runs[0].run_id}", "Metrics", False
    for step in newest.steps:
        if "loss" in step.metrics:
            page = f"experiments/{experiment}/runs/{step.run_id}"
            yield "mlflow-train-step", page, "Metrics", False
            yield "mlflow-loss-curve", f"{page}/model-metrics", "loss", True
            yield "mlflow-system-metrics", f"{page}/system-metrics", "cpu_utilization", True
    compared = [s.run_id for s in newest.steps if s.name.startswith("evaluate")]
    compared = compared or [run.run_id for run in runs]
    ids = ",".join(f'"{run_id}"' for run_id in compared)
    query = f'runs=[{ids}]&experiments=["{experiment}"]'
    yield "mlflow-compare", f"compare-runs?{query}", "Comparing", True


def main() -> None:
    """Take every screenshot."""
    from selenium.common.exceptions import TimeoutException

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--run")
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    workspace = Workspace.locate(given.workspace)
    store, port = resolve(workspace.mlflow_uri, workspace), free_port("127.0.0.1")
    given.out.mkdir(parents=True, exist_ok=True)
    log = workspace.root / "mlflow-ui.log"
    missed: list[str] = []
    with serving(store, "127.0.0.1", port, log), browser() as driver:
        for name, page, text, chart in pages(store, given.run):
            if given.only and name not in given.only:
                continue
            joint = "&" if "?" in page else "?"
            url = f"http://127.0.0.1:{port}/#/{page}{joint}workflowType=machine_learning"
            try:
                photograph(driver, url, text, chart, given.out / f"{name}.png")
            except TimeoutException:
                missed.append(f"{name}: {text!r} did not appear on {url} in {DRAWN_S} s")
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
