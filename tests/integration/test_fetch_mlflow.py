"""A registered model comes here through the core's interpreter. Runs where MLflow is (``core``)."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.errors import ModelError, RecipeError
from toolkit.observe import observe
from toolkit.plan import make_plan
from toolkit.recipe import Recipe
from toolkit.recipe.load import Loaded
from toolkit.stages import Interpreter, StageContext
from toolkit.stages.fetch import Fetch, FetchConfig
from toolkit.tracking import resolve
from toolkit.tracking.client import connect
from toolkit.workspace import Workspace

pytest.importorskip("pydantic")
pytestmark = pytest.mark.integration

REGISTER = """
import sys, mlflow
client = mlflow.MlflowClient()
client.create_registered_model("tickets")
version = client.create_model_version("tickets", sys.argv[1]).version
client.set_registered_model_alias("tickets", "champion", version)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (path / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


def context(root: Path) -> StageContext:
    for name in ("output", "state"):
        (root / name).mkdir(exist_ok=True)
    return StageContext(
        inputs={},
        output=root / "output",
        state=root / "state",
        recipe_dir=root,
        interpreters={"core": Interpreter(Path(sys.executable))},
    )


def loaded(folder: Path, source: str) -> Loaded:
    recipe = Recipe.model_validate({"name": "r", "model": {"source": source}})
    return Loaded(recipe, folder / "r.yaml")


def test_an_alias_is_planned_as_the_version_it_names_now(model: Path, tmp_path: Path) -> None:
    store = resolve(f"sqlite:///{tmp_path / 'mlflow.db'}", Workspace(tmp_path / "runs"))
    recipe = loaded(tmp_path, "models:/tickets@champion")
    register = [sys.executable, "-c", REGISTER, str(model)]
    subprocess.run(
        register, check=True, cwd=tmp_path, env=os.environ | {"MLFLOW_TRACKING_URI": store.uri}
    )
    first = make_plan(recipe, observe(recipe, {"train": "t"}, store)).step("fetch")
    assert first.config["source"] == "models:/tickets/1"

    client = connect(store)
    client.create_model_version("tickets", str(model))
    client.set_registered_model_alias("tickets", "champion", "2")
    second = make_plan(recipe, observe(recipe, {"train": "t"}, store)).step("fetch")
    assert second.config["source"] == "models:/tickets/2"
    assert first.fingerprint != second.fingerprint

    with pytest.raises(
        RecipeError, match=r"model\.source: names 'models:/tickets@other', but sqlite"
    ):
        observe(loaded(tmp_path, "models:/tickets@other"), {}, store)


def test_a_registered_model_is_downloaded_by_alias(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", REGISTER, str(model)], check=True)
    ctx = context(tmp_path)
    result = Fetch().run(FetchConfig(source="models:/tickets@champion"), ctx)
    assert result.facts["parameters"] == 4
    assert list(ctx.state.iterdir()) == []

    with pytest.raises(
        ModelError, match=r"(?s)cannot get models:/tickets@other: .*alias other not found"
    ):
        Fetch().run(FetchConfig(source="models:/tickets@other"), context(tmp_path))
