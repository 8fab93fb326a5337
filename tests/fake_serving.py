"""``python fake_serving.py FOLDER``: the real supervisor with the fake engine behind it.

Proofs cannot be made of an engine that computes nothing: they are replaced by one that asks it once, and fails where
a folder holds ``unproven``.
"""

import sys
from pathlib import Path

from toolkit.engines import ENGINES
from toolkit.engines.client import Client
from toolkit.errors import ProofError
from toolkit.proof import AdapterProof, certificate, proofs

ENGINES._table["vllm"] = "tests.unit.fake_engine:FakeEngine"


def prove(target, on_proof=None):
    for name, folder in [
        (target.name, target.folder),
        *((a.name, a.path) for a in target.adapters),
    ]:
        if on_proof:
            on_proof(f"parity of {name}")
        if (Path(folder) / "unproven").exists():
            raise ProofError(f"{name}: token 3 differs", "export it again")
    Client(target.url).complete(target.model_id, "1", max_tokens=1)
    return Shown(target, [prove_adapter(target, a) for a in target.adapters])


def prove_adapter(target, adapter):
    if (Path(adapter.path) / "unproven").exists():
        raise ProofError(f"{adapter.name}: it answers as the base does", "is it all zeros?")
    Client(target.url).complete(adapter.model_id, "1", max_tokens=1)
    numbers = {"effect_mean": 0.38, "effect_max": 1, "noise_mean": 0, "noise_max": 0, "seconds": 0}
    nothing = {"parity": None, "agreement": None, "scale": None, "unexplained": None, "digests": {}}
    return AdapterProof(adapter.name, adapter.model_id, **numbers, **nothing)


class Shown:
    version = "0.32.0"

    def __init__(self, target, adapters):
        self.target, self.adapters = target, adapters

    def with_adapter(self, proof):
        return Shown(self.target, [*self.adapters, proof])

    def without_adapter(self, model_id):
        return Shown(self.target, [a for a in self.adapters if a.model_id != model_id])


def made(shown, *, name, phases=None, **_):
    proven = [[s.target.model_id, *(a.model_id for a in s.adapters)] for s in shown]
    return {"id": "fake", "name": name, "phases": phases, "proofs": proven}


proofs.prove, proofs.prove_adapter = prove, prove_adapter
proofs.warm_up = lambda target, adapters=None: None
certificate.certificate = made

if __name__ == "__main__":
    from toolkit.serving.__main__ import main

    sys.exit(main(sys.argv[1:]))
