"""Reference pages are what the code says, links lead somewhere, and examples in pages are valid."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from toolkit.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language):
    for page in PAGES:
        for kind, text in FENCE.findall(page.read_text()):
            if kind == language:
                yield pytest.param(text, id=f"{page.relative_to(ROOT)}:{text.splitlines()[0][:40]}")


@pytest.mark.parametrize("name", generator().PAGES)
def test_a_generated_page_is_current(name):
    assert (ROOT / name).read_text() == generator().render(name), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_yaml_in_pages_is_a_recipe_or_part_of_one(text):
    values = yaml.safe_load(text)
    if not set(values) <= set(Recipe.model_fields):  # a profile or a CI job
        assert "name" in values or "jobs" in values
        return
    whole = {
        "name": "x",
        "model": {"source": "./model"},
        "data": {"sources": [{"path": "a.jsonl"}]},
    }
    if "export" in values or "evaluate" in values or "serve" in values:
        whole["train"] = {}
    Recipe.model_validate(whole | values)


def test_commands_in_pages_exist():
    from toolkit.cli import COMMANDS

    for page in PAGES:
        if page.parent.name == "adr":
            continue
        for name in re.findall(r"^\$? ?toolkit ([a-z]+)", page.read_text(), re.MULTILINE):
            assert name in COMMANDS, f"{page}: toolkit {name}"


def test_no_page_names_a_folder_of_one_machine():
    for page in PAGES:
        for place in ("/tmp/", "/home/", "/root/"):
            assert place not in page.read_text(), page
