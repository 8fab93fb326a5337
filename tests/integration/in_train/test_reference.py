"""An adapter from elsewhere gets what it must be held against: the training side's own forward."""

import json
import shutil

import pytest

from toolkit.errors import PreflightError
from toolkit.proof import identity, reference
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.export import Export, ExportConfig
from toolkit.stages.reference import Reference, ReferenceConfig
from toolkit.stages.train import Train

pytestmark = pytest.mark.integration


@pytest.fixture
def exported(train_config, context):
    """What our own export writes, with its reference."""
    trained = context("train")
    result = Train().run(train_config(), trained)
    ctx = context("export", adapter=Input(trained.output, Kind.adapter, "a" * 64, result.facts))
    Export().run(ExportConfig(format="adapter"), ctx)
    return ctx.output


@pytest.fixture
def foreign(exported, tmp_path):
    """The same as somebody else would hand it over: weights, settings, a template of its own."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(exported / name, folder / name)
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    return folder


def run(tmp_path, base, folder, dataset=None):
    out, state = tmp_path / "out", tmp_path / "state"
    out.mkdir()
    state.mkdir()
    inputs = {"model": Input(base, Kind.model, "b" * 64)}
    inputs |= {"dataset": Input(dataset, Kind.dataset, "c" * 64)} if dataset else {}
    ctx = StageContext(inputs, out, state, tmp_path)
    config = ReferenceConfig(name="a", path=folder.name, digests={folder.name: "d" * 64})
    return Reference().run(config, ctx), out


def test_it_is_the_reference_that_our_own_export_would_have_written(
    tmp_path, base, dataset, exported, foreign
):
    result, out = run(tmp_path, base, foreign, dataset)
    assert result.facts == {"adapter": "a", "not_scored": None}
    made, own = reference.read(out), reference.read(exported)
    assert made.rows == own.rows
    assert made.conversations == own.conversations
    assert made.digests == own.digests, "the base's template and tokenizer, the adapter's weights"
    assert (made.kind, made.trained_on) == ("adapter", None)
    assert identity.weights_digest(out) == identity.weights_digest(foreign)
    assert (out / "adapter_config.json").read_bytes() == (
        foreign / "adapter_config.json"
    ).read_bytes()


def test_an_adapter_that_does_not_fit_its_base_says_so_and_claims_nothing(tmp_path, base, foreign):
    file = foreign / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))
    result, out = run(tmp_path, base, foreign)
    assert "it cannot be loaded here: " in result.facts["not_scored"]
    made = reference.read(out)
    assert made.rows == ()
    assert made.not_scored == result.facts["not_scored"]


def test_a_folder_without_safetensors_is_refused(tmp_path, base, foreign):
    (foreign / "adapter_model.safetensors").unlink()
    with pytest.raises(PreflightError, match=r"has no adapter_model\.safetensors") as error:
        run(tmp_path, base, foreign)
    assert error.value.hint == "give the folder that PEFT wrote, with safetensors"
