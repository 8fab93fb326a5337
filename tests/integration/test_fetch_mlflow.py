"""A registered model comes here through the core's interpreter. Runs where MLflow is (``core``)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.errors import ModelError
from toolkit.stages import Interpreter, StageContext
from toolkit.stages.fetch import Fetch, FetchConfig

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
