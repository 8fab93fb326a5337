"""The proofs against a real vLLM on a CPU: one server, many adapters that are broken in their own ways.

The interpreters are those of the environments, or ``TOOLKIT_TEST_VLLM`` and ``TOOLKIT_TEST_TRAIN`` where these are set.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import proof_cases
from tests.integration.test_real_vllm_is_supervised import adapter as tiny_adapter
from tests.integration.test_real_vllm_is_supervised import interpreter, tiny_llama
from toolkit import environments
from toolkit.engines.server import running
from toolkit.engines.vllm import Vllm
from toolkit.errors import ProofError
from toolkit.proof import ProofTarget, ServedAdapter, identity, proofs, reference
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]

WRITE = """
import sys
from pathlib import Path
from toolkit.proof import training_side
base, *adapters = map(Path, sys.argv[1:])
training_side.of_base(base, "cpu")
for adapter in adapters:
    training_side.of_adapter(adapter, base, facts={"trained_on": "fp32"}, dataset=None, device="cpu")
"""


def train_python() -> Path:
    """Of the user's cache: asked before the tests get one of their own."""
    given = os.environ.get("TOOLKIT_TEST_TRAIN")
    return Path(given) if given else environments.resolve("train").interpreter().python


def remember(python: Path, base: Path, *adapters: Path) -> None:
    """Write references with the training side's own libraries."""
    command = [str(python), "-c", WRITE, str(base), *map(str, adapters)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=600)


class Served:
    """A running engine and the adapters it was given."""

    def __init__(self, server, train: Path, base: Path, root: Path) -> None:
        self.server, self.train, self.base, self.root = server, train, base, root
        self.target = ProofTarget(
            server.url, "vllm", "tiny-base", "tiny-base", base, 128, dtype="fp32"
        )

    def prove(self, loads: Path, should_be: Path | None = None, **changes):
        """Load a folder at run time and prove that it is ``should_be``."""
        name = f"{loads.name}@1"
        self.server.client.call(Vllm().load_adapter(name, loads))
        asked = ServedAdapter(loads.name, name, should_be or loads)
        try:
            return proofs.prove_adapter(dataclasses.replace(self.target, **changes), asked)
        finally:
            self.server.client.call(Vllm().unload_adapter(name))


@pytest.fixture(scope="module")
def served(tmp_path_factory, warm_cache):
    root = tmp_path_factory.mktemp("proofs")
    python, train = interpreter(), train_python()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(warm_cache(root / "cache")))
        base, good = tiny_llama(root / "base"), tiny_adapter(root / "good")
        for name in ("tokenizer.json", "chat_template.jinja"):
            (good / name).write_bytes((base / name).read_bytes())
        rslora = proof_cases.changed(good, root / "rslora", use_rslora=True)
        remember(train, base, good, rslora)
        section = ServeSection(port=0, max_concurrent=4, kv_cache_gib=0.25, dtype="fp32")
        with running(
            "vllm", Interpreter(python), base, {"tiny": good}, section, name="tiny",
            max_length=128, device="cpu", log=root / "engine.log",
        ) as server:  # fmt: skip
            yield Served(server, train, base, root)


@pytest.fixture
def good(served) -> Path:
    return served.root / "good"


def test_what_is_served_as_trained_is_proven_to_the_last_digits(served, good):
    adapters = (ServedAdapter("tiny", "tiny", good),)
    proof = proofs.prove(dataclasses.replace(served.target, adapters=adapters))
    assert proof.base.agreement.mean < 1e-3
    assert proof.base.parity.conversations >= 12
    (tuned,) = proof.adapters
    assert tuned.agreement.mean < 1e-3
    assert tuned.scale == pytest.approx(1, abs=0.01)
    assert tuned.effect_mean > 0.01
    assert set(proof.warm_up.seconds) == {"tiny-base", "tiny"}
    assert proof.version


def test_scores_are_the_same_alone_and_in_a_batch_and_kill_nothing(served, good):
    proof = served.prove(good)
    assert proof.noise_max < 1e-3
    assert served.server.client.healthy()


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        (proof_cases.zero, r"all \d+ matrices lora_B are zero"),
        (proof_cases.mis_prefixed, r"layers it names are not in the base"),
    ],
)
def test_an_adapter_that_acts_as_its_base_never_becomes_ready(served, good, tensors, cause):
    folder = proof_cases.changed(good, served.root / tensors.__name__, tensors)
    with pytest.raises(ProofError, match=cause) as caught:
        served.prove(folder)
    assert "answers as its base does" in caught.value.message


def test_what_vllm_loads_instead_of_the_right_folder_is_found_by_its_logprobs(served, good):
    folder = proof_cases.changed(good, served.root / "half", proof_cases.every_other_layer)
    with pytest.raises(ProofError, match="what the adapter changes is not what it was trained to"):
        served.prove(folder, should_be=good)


def test_an_ignored_rslora_is_called_by_its_name(served, good):
    with pytest.raises(ProofError, match="rsLoRA ignored"):
        served.prove(good, should_be=served.root / "rslora")
    assert served.prove(served.root / "rslora").scale == pytest.approx(1, abs=0.01)


def test_a_scale_that_is_wrong_by_a_fifth_is_found(served, good):
    folder = proof_cases.changed(good, served.root / "louder", lora_alpha=9.6)
    with pytest.raises(ProofError, match=r"what the adapter changes|served logprobs differ"):
        served.prove(folder, should_be=good)


def test_the_adapter_of_another_base_is_refused(served, good):
    folder = proof_cases.changed(good, served.root / "other-base")
    stored = reference.read(good)
    dataclasses.replace(stored, digests={**stored.digests, "base": "f" * 64}).write(folder)
    with pytest.raises(ProofError, match="was trained on another base"):
        served.prove(folder)


def test_a_truncated_file_never_reaches_the_engine(served, good):
    folder = proof_cases.truncated(good, served.root / "truncated")
    with pytest.raises(ProofError, match="is cut off"):
        proofs.require_loadable("tiny", folder, served.base)


def test_one_space_in_the_template_stops_it(served):
    stored = reference.read(served.base)
    chats = [c for c in stored.conversations if c.name == "system"]
    template = served.base / "chat_template.jinja"
    before = template.read_text()
    try:
        # What training used is one space longer than what the server was started with.
        template.write_text(before.replace("{{ m.content }}", "{{ m.content }} "))
        remember(served.train, served.base)
        with pytest.raises(ProofError, match=r"is not what training saw: token \d+ differs"):
            proofs.prove_base(served.target)
    finally:
        template.write_text(before)
        stored.write(served.base)
    assert proofs.prove_base(served.target).parity.conversations > len(chats)


def test_an_adapters_digest_is_the_name_of_its_version(good):
    assert json.loads((good / "reference.json").read_text())["digests"]["weights"].startswith(
        identity.adapter_version(good)
    )
