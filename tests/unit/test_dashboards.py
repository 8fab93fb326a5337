"""The dashboard and the alerts: queries ask for metrics that exist, and every alert fires when it should."""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.core import Metric

from toolkit.cli import toolkit
from toolkit.errors import UsageError
from toolkit.gateway.metrics import Metrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "jobs" / "observability"
TESTS = ROOT / "tests" / "observability" / "alerts.test.yaml"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
ALERTS = [
    r for g in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for r in g["rules"]
]
NOT_OURS = {"up"}
"""Metrics that Prometheus makes itself."""


def panels():
    return [p for p in DASHBOARD["panels"] if p["type"] != "row"]


def queries():
    """Title and PromQL of all that the dashboard and the alerts ask."""
    found = [(p["title"], t["expr"]) for p in panels() for t in p["targets"]]
    found += [(a["name"], a["expr"]) for a in DASHBOARD["annotations"]["list"]]
    return found + [(r["alert"], r["expr"]) for r in ALERTS]


@cache
def families() -> dict[str, Metric]:
    """What a front says of itself, by the names that its series have."""
    metrics = Metrics()
    metrics.count_drops(lambda: {"access_log": 0})
    names = {}
    for family in metrics.registry.collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        for ending in endings.get(family.type, ("",)):
            names[family.name + ending] = family
    return names


@cache
def labels():
    """The labels of our own series, by name of the series."""
    metrics = Metrics()
    found = {}
    for collector in vars(metrics).values():
        if hasattr(collector, "_labelnames"):
            for family in collector.describe():
                for ending in ("", "_total", "_bucket", "_sum", "_count"):
                    found[family.name + ending] = set(collector._labelnames)
    return found


@pytest.fixture
def promtool():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")

    def run(*words):
        done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(("title", "query"), queries())
def test_every_metric_exists(title, query):
    known = families()
    named = set(re.findall(r"\b(?:toolkit|process|python)_[a-z_]+", query)) | (
        {"up"} if re.search(r"\bup\{", query) else set()
    )
    assert named, query
    assert named <= set(known) | NOT_OURS, named - set(known)


@pytest.mark.parametrize(("title", "query"), queries())
def test_every_label_exists(title, query):
    known = labels()
    for name, selector in re.findall(r"\b(toolkit_[a-z_]+)\{([^}]*)\}", query):
        asked = set(re.findall(r"(\w+)=~?\"", selector)) - {"instance", "job"}
        assert asked <= known.get(name, {"sink"}), (name, asked)


def test_every_query_of_the_dashboard_is_promql(promtool, tmp_path):
    rules = [
        {"record": f"panel:{i}", "expr": re.sub(r"\$__rate_interval", "5m", query)}
        for i, (_, query) in enumerate(queries())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


def test_the_shipped_configuration_and_its_alerts_are_valid(promtool):
    promtool("check", "rules", str(FOLDER / "alerts.yaml"))
    promtool("check", "config", str(FOLDER / "prometheus.yaml"))


def test_every_alert_fires_when_it_should_and_only_then(promtool):
    assert "SUCCESS" in promtool("test", "rules", str(TESTS))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    cases = [c for t in yaml.safe_load(TESTS.read_text())["tests"] for c in t["alert_rule_test"]]
    names = {r["alert"] for r in ALERTS}
    assert {c["alertname"] for c in cases if c.get("exp_alerts")} == names
    assert {c["alertname"] for c in cases if not c.get("exp_alerts")} == names


@pytest.mark.parametrize("rule", ALERTS, ids=lambda r: r["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "action"}


def test_the_dashboard_is_complete():
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"\$(\w+)", json.dumps(panels()))) - {"__rate_interval"}
    assert used | {"datasource"} == {v["name"] for v in DASHBOARD["templating"]["list"]}
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
    for kind in (
        "requests",
        "tokens",
        "time_to_first_token",
        "time_per_output_token",
        "errors",
        "engine_wait",
    ):
        assert any(f"toolkit_{kind}" in query for _, query in queries()), kind


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        p = panel["gridPos"]
        cells = {
            (x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_export_copies_the_files_and_replaces_none_unasked(tmp_path):
    folder = tmp_path / "new" / "obs"
    result = CliRunner().invoke(toolkit, ["dashboards", "export", str(folder)])
    assert result.exit_code == 0, result.output
    assert {p.name for p in folder.iterdir()} == {p.name for p in FOLDER.iterdir()}
    (folder / "alerts.yaml").write_text("mine")
    result = CliRunner().invoke(toolkit, ["dashboards", "export", str(folder)])
    assert isinstance(result.exception, UsageError)
    assert "add --force" in result.exception.hint
    assert (folder / "alerts.yaml").read_text() == "mine"
    result = CliRunner().invoke(toolkit, ["dashboards", "export", str(folder), "--force"])
    assert result.exit_code == 0
    assert (folder / "alerts.yaml").read_bytes() == (FOLDER / "alerts.yaml").read_bytes()


def test_the_page_lists_every_alert_and_every_metric():
    page = (ROOT / "docs" / "how-to" / "dashboards.md").read_text()
    rows = dict(re.findall(r"^\| `(Toolkit\w+)` \| (\w+) \|", page, re.MULTILINE))
    assert rows == {r["alert"]: r["labels"]["severity"] for r in ALERTS}
    ours = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for name in families()
        if name.startswith("toolkit_")
    }
    assert ours == set(re.findall(r"`(toolkit_[a-z_]+)`", page))
    for file in FOLDER.iterdir():
        assert f"watch/{file.name}\n" in page
