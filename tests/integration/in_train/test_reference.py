"""An adapter from elsewhere gets what it must be held against: the training side's own forward."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from toolkit.errors import PreflightError
from toolkit.models.folder import copy_companions
from toolkit.proof import identity, reference, training_side
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.reference import Reference, ReferenceConfig

pytestmark = pytest.mark.integration


@pytest.fixture
def foreign(base, tmp_path):
    """What somebody else would hand over: weights, settings, a template of its own."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    get_peft_model(model, settings).save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign" / "chat_template.jinja").write_text("{{ 1 }}")
    return tmp_path / "foreign"


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
    tmp_path, base, dataset, foreign
):
    result, out = run(tmp_path, base, foreign, dataset)
    assert result.facts == {"adapter": "a", "not_scored": None}
    exported = tmp_path / "exported"
    shutil.copytree(foreign, exported)
    copy_companions(base, exported)
    own = training_side.of_adapter(exported, base, facts={}, dataset=dataset, device="cpu")
    made = reference.read(out)
    assert made == own, "the base's template and tokenizer, the adapter's weights and logprobs"
    assert made.rows
    assert all(row.logprobs != row.beside for row in made.rows)
    assert (made.kind, made.trained_on) == ("adapter", None)
    assert made.digests["base"] == identity.weights_digest(base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (foreign / name).read_bytes()


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
