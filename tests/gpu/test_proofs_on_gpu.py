"""The proofs against real engines on a GPU: what they let through, what they stop, and the differences they measure.

Run there with ``python3 -m pytest -m gpu -s tests/gpu/test_proofs_on_gpu.py``; ``-s`` shows the measured numbers, of
which ``toolkit/proof/tolerance.py`` is made. Environment variables:

``TOOLKIT_GPU_BASE``, ``TOOLKIT_GPU_ADAPTER``: folders of a base and of an adapter on it (the demo's ``fetch`` and
``export-adapter`` artifacts); ``TOOLKIT_GPU_VLLM_SITE``, ``TOOLKIT_GPU_SGLANG_SITE``: folders of packages for the
engines, put before the host's own (see ``jobs/profiles/gpu-host.yaml``); ``TOOLKIT_GPU_TRAIN_SITE``: the same for
transformers and peft, if the host's own will not do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import proof_cases
from toolkit.engines import ENGINES
from toolkit.engines.server import running
from toolkit.errors import ProofError
from toolkit.proof import ProofTarget, ServedAdapter, certificate, proofs
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter

GIVEN = {key: os.environ.get(f"TOOLKIT_GPU_{key}") for key in ("BASE", "ADAPTER", "TRAIN_SITE")}
SITES = {e: os.environ.get(f"TOOLKIT_GPU_{e.upper()}_SITE") for e in ("vllm", "sglang")}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(
        not (GIVEN["BASE"] and GIVEN["ADAPTER"]),
        reason="TOOLKIT_GPU_BASE and TOOLKIT_GPU_ADAPTER name no folders",
    ),
]

VARIABLES = {
    "vllm": {"VLLM_USE_FLASHINFER_SAMPLER": "0"},
    "sglang": {"CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda")},
}
ARGUMENTS = {
    "vllm": (),
    "sglang": ("--attention-backend", "triton", "--sampling-backend", "pytorch"),
}
WRITE = """
import sys
from pathlib import Path
from toolkit.proof import training_side
base, *adapters = map(Path, sys.argv[1:])
training_side.of_base(base, "cuda")
facts = {"trained_on": "bf16", "precision": "bf16"}
for adapter in adapters:
    training_side.of_adapter(adapter, base, facts=facts, dataset=None, device="cuda")
"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Copies with fresh references of this GPU's training side."""
    root = tmp_path_factory.mktemp("proofs")
    base, good = root / "base", root / "good"
    shutil.copytree(GIVEN["BASE"], base)
    shutil.copytree(GIVEN["ADAPTER"], good)
    alpha = json.loads((good / "adapter_config.json").read_text())["lora_alpha"]
    # The same change as the good one when it is scaled right: alpha / sqrt(r) is alpha / r of four times the alpha.
    rslora = proof_cases.changed(good, root / "rslora", use_rslora=True, lora_alpha=alpha / 4)
    made = {
        "base": base,
        "good": good,
        "rslora": rslora,
        "zero": proof_cases.changed(good, root / "zero", proof_cases.zero),
        "prefix": proof_cases.changed(good, root / "prefix", proof_cases.mis_prefixed),
        "half": proof_cases.changed(good, root / "half", proof_cases.every_other_layer),
        "louder": proof_cases.changed(good, root / "louder", lora_alpha=alpha * 1.5),
    }
    site = {"PYTHONPATH": GIVEN["TRAIN_SITE"]} if GIVEN["TRAIN_SITE"] else {}
    command = [sys.executable, "-c", WRITE, str(base), str(good), str(rslora)]
    subprocess.run(command, check=True, env=os.environ | site, timeout=900)
    return made


@pytest.fixture(
    scope="session", params=[("vllm", "auto"), ("vllm", "fp16"), ("sglang", "auto")], ids="-".join
)
def served(request, folders, tmp_path_factory):
    """A running engine: its target, and how to load a folder into it."""
    engine, dtype = request.param
    if not SITES[engine]:
        pytest.skip(f"TOOLKIT_GPU_{engine.upper()}_SITE names no folder")
    section = ServeSection(
        engine=engine, port=0, dtype=dtype, eager=True, max_concurrent=16, memory_fraction=0.5,
        extra_args=ARGUMENTS[engine],
    )  # fmt: skip
    python = Interpreter(Path(sys.executable), (Path(SITES[engine]),), VARIABLES[engine])
    log = tmp_path_factory.mktemp(engine) / "engine.log"
    with running(
        engine, python, folders["base"], {"tickets": folders["good"]}, section, name="tickets",
        max_length=2048, device="cuda", log=log,
    ) as server:  # fmt: skip
        names = list(server.models.values())
        target = ProofTarget(
            server.url, engine, names[0], "tickets-base", folders["base"], 2048,
            (ServedAdapter("tickets", names[1], folders["good"]),), dtype=dtype, device="cuda",
        )  # fmt: skip
        yield Served(server, target, ENGINES[engine]())


class Served:
    def __init__(self, server, target: ProofTarget, engine) -> None:
        self.server, self.target, self.engine = server, target, engine

    def prove(self, loads: Path, should_be: Path | None = None, **changes):
        """Load a folder at run time and prove that it is ``should_be``."""
        name = f"{loads.name}@1"
        self.server.client.call(self.engine.load_adapter(name, loads))
        model_id = name if self.engine.name == "vllm" else f"{self.target.model_id}:{name}"
        asked = ServedAdapter(loads.name, model_id, should_be or loads)
        try:
            return proofs.prove_adapter(dataclasses.replace(self.target, **changes), asked)
        finally:
            self.server.client.call(self.engine.unload_adapter(name))


def test_what_is_served_as_trained_is_proven(served):
    proof = proofs.prove(served.target)
    given = certificate.certificate([proof], name="tickets")
    (tuned,) = proof.adapters
    print(
        f"\nMEASURED {served.target.engine} {proof.version} {served.target.dtype} {given['machine']}\n"
        f"  base     {proof.base.agreement}\n  adapter  {tuned.agreement}\n"
        f"  scale {tuned.scale} unexplained {tuned.unexplained} effect {tuned.effect_mean} "
        f"noise {tuned.noise_mean} (max {tuned.noise_max}) seconds {proof.base.seconds} + {tuned.seconds} "
        f"warm-up {proof.warm_up.seconds}"
    )
    assert tuned.agreement.mean <= tuned.agreement.tolerance
    assert proof.base.parity.conversations >= 12
    assert proof.base.seconds + tuned.seconds < 30


def test_the_tolerance_has_room_and_is_not_idle(served, folders):
    """What is measured stays well under the bound for a right adapter, and a scale off by a half is above it."""
    right = served.prove(folders["good"])
    assert right.agreement.mean < 0.7 * right.agreement.tolerance
    with pytest.raises(ProofError) as caught:
        served.prove(folders["louder"], should_be=folders["good"])
    print(caught.value.message)


def test_a_zero_adapter_never_becomes_ready(served, folders):
    with pytest.raises(ProofError, match=r"all \d+ matrices lora_B are zero"):
        served.prove(folders["zero"])


def test_a_mis_prefixed_adapter_never_becomes_ready_where_it_is_not_served(served, folders):
    if served.target.engine == "sglang":  # matches layers by their number, whatever stands before
        assert served.prove(folders["prefix"]).effect_mean > 0.1
        return
    with pytest.raises(ProofError, match="answers as its base does"):
        served.prove(folders["prefix"])


def test_missing_layers_never_become_ready(served, folders):
    with pytest.raises(ProofError, match="what the adapter changes is not what it was trained to"):
        served.prove(folders["half"], should_be=folders["good"])


def test_rslora_is_served_or_named(served, folders):
    if served.target.engine == "vllm":
        assert served.prove(folders["rslora"]).scale == pytest.approx(1, abs=0.1)
        return
    with pytest.raises(ProofError, match="rsLoRA ignored"):  # SGLang 0.5.17
        served.prove(folders["rslora"])
