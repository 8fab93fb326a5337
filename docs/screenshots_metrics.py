"""Take the screenshots of `how-to/dashboards.md`: ``python docs/screenshots_metrics.py URL --out FOLDER``.

URL is a Prometheus that scrapes a front under load with the shipped `prometheus.yaml` and `alerts.yaml`. Needs what
`screenshots.py` needs. The pages are those of Debian's Prometheus, which has the classic interface.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from screenshots import DRAWN_S, SETTLE_S, browser

RANGE = "10m"
BY_TARGET = (
    "histogram_quantile(0.95, sum by (le, model, target) "
    "(rate(toolkit_time_to_first_token_seconds_bucket[1m])))"
)
GRAPHS = {
    "metrics-requests": 'sum by (model, target, key) (rate(toolkit_requests_total{status="200"}[1m]))',
    "metrics-first-token": BY_TARGET,
}
"""File name -> query; those of panels of the dashboard, with a minute in place of Grafana's interval."""

OPEN_FIRST = (
    "document.querySelector('.alert-danger.alert_header, .alert-warning.alert_header')?.click();"
)
"""Shows the details of the first alert that fires or is about to."""


def graph(driver: Any, base: str, query: str, file: Path) -> None:
    """The graph page with one query."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    asked = {"g0.expr": query, "g0.tab": 0, "g0.stacked": 0, "g0.range_input": RANGE}
    driver.get("about:blank")
    driver.get(f"{base}/classic/graph?{urlencode(asked)}")
    wait = WebDriverWait(driver, DRAWN_S)
    wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, ".rickshaw_graph svg path"))
    save(driver, file)


def page(driver: Any, url: str, text: str, file: Path) -> None:
    """Any other page, once ``text`` is on it."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(url)
    WebDriverWait(driver, DRAWN_S).until(lambda d: text in d.find_element(By.TAG_NAME, "body").text)
    driver.execute_script(OPEN_FIRST)
    save(driver, file)


def save(driver: Any, file: Path) -> None:
    """Write what is seen."""
    time.sleep(SETTLE_S)
    driver.save_screenshot(str(file))
    print(file)


def main() -> None:
    """Take every screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    given = parser.parse_args()
    with browser() as driver:
        driver.set_window_size(1400, 1100)
        for name, query in GRAPHS.items():
            graph(driver, given.url, query, given.out / f"{name}.png")
        page(driver, f"{given.url}/classic/alerts", "ToolkitDown", given.out / "metrics-alerts.png")


if __name__ == "__main__":
    main()
