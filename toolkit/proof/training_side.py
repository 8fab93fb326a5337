"""Writing ``reference.json``: ids from the training path's rendering, logprobs from the training-side forward.

This is the one module of the proofs that needs torch and transformers (imported inside); it runs within the stages that
write a folder, while they have its model loaded.

Legend: N tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import __version__
from toolkit.proof import conversations, identity
from toolkit.proof.engine_calls import TOP
from toolkit.proof.reference import PLACES, Kind, Logprobs, Reference, StoredConversation, StoredRow

if TYPE_CHECKING:
    from toolkit.train.model import Precision

PROMPT_TOKENS = 64
"""Tokens before those that are scored, at most: a CPU reads 30 a second."""
REPEATS = 8
"""Scored tokens of a row."""
HELD_OUT_ROWS = 6
"""Held-out rows that are scored."""
HELD_OUT_CHATS = 3
"""Held-out rows whose question is compared token by token."""
SCORED = ("no system", "system", "emoji", "white space")
"""Stored conversations that are scored too, with the first tokens of :data:`ANSWER` behind them."""
ANSWER = 'Your order is on its way. It should be there within two days: {"eta": 2}'
USED = 0.8
"""Share of the free memory that a model may take."""
LIBRARIES = ("torch", "transformers", "tokenizers", "peft")


Ids = tuple[int, ...]


class Recorder:
    """Collects what a ``reference.json`` holds while a stage has the models at hand.

    Args:
        folder: Has the tokenizer and the chat template.
        dataset: Folder of the dataset artifact, if there is one: some held-out rows are stored too.
        trust_remote_code: Run Python code that lies in ``folder``.
    """

    def __init__(
        self, folder: Path, dataset: Path | None = None, *, trust_remote_code: bool = False
    ) -> None:
        from toolkit.data.encode import load_tokenizer

        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.conversations = tuple(render(tokenizer, dataset))
        self.rows = dict(rows(tokenizer, self.conversations, dataset))
        self._scores: dict[str, dict[str, tuple[Logprobs, tuple[dict[int, float], ...]]]] = {}
        self.not_scored: str | None = None

    def score(self, side: str, model: Any) -> None:
        """Let a loaded model score all rows; ``side`` is ``model``, ``beside`` or the name of a fault."""
        self._scores[side] = {
            name: score(model, ids, start) for name, (ids, start) in self.rows.items()
        }

    def write(
        self,
        folder: Path,
        kind: Kind,
        *,
        precision: str,
        trained_on: str | None = None,
        base: Path | None = None,
        made_from: Path | None = None,
    ) -> Reference:
        """Write the file into a folder that has its weights, tokenizer and template by now."""
        digests: dict[str, str | None] = dict(identity.folder_digests(folder))
        digests |= {"base": _weights(base), "made_from": _weights(made_from)}
        scored = self._stored_rows() if "model" in self._scores else ()
        reference = Reference(
            kind,
            digests,
            self.conversations,
            scored,
            precision,
            trained_on,
            _versions(),
            self.not_scored,
        )
        reference.write(folder)
        return reference

    def _stored_rows(self) -> tuple[StoredRow, ...]:
        sides = dict(self._scores)
        own, beside = sides.pop("model"), sides.pop("beside", None)
        return tuple(
            StoredRow(
                name,
                ids,
                start,
                own[name][0],
                own[name][1],
                beside[name][0] if beside else None,
                {fault: scores[name][0] for fault, scores in sides.items()},
                beside[name][1] if beside else None,
            )
            for name, (ids, start) in self.rows.items()
        )


def render(tokenizer: Any, dataset: Path | None = None) -> Iterator[StoredConversation]:
    """Stored and held-out conversations with the ids of the training path; none without a chat template."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return
    specials = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    yield from (
        _rendered(tokenizer, conversation)
        for conversation in (
            *conversations.stored(template, [token for token in specials if token]),
            *conversations.held_out(_held_out(dataset), HELD_OUT_CHATS),
        )
    )


def _rendered(tokenizer: Any, conversation: conversations.Conversation) -> StoredConversation:
    from jinja2 import TemplateError

    from toolkit.data.render import question_ids

    given = (conversation.name, conversation.messages, conversation.tools, conversation.kwargs)
    tools = list(conversation.tools) or None
    try:
        ids = question_ids(
            tokenizer, [dict(m) for m in conversation.messages], tools, **conversation.kwargs
        )
    except (
        TemplateError,
        TypeError,
    ) as error:  # what a template raises on purpose or by a missing key
        return StoredConversation(*given, refused=str(error) or type(error).__name__)
    return StoredConversation(*given, ids=tuple(ids))


def rows(
    tokenizer: Any, stored: Sequence[StoredConversation], dataset: Path | None
) -> Iterator[tuple[str, tuple[Ids, int]]]:
    """Names, ids and first scored position of the rows."""
    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    chosen = [c for c in stored if c.name in SCORED and c.refused is None]
    for n, conversation in enumerate(chosen):
        yield conversation.name, row((*conversation.ids, *answer), len(conversation.ids) + n)
    if not chosen:
        ids = tuple(tokenizer.encode(ANSWER))
        yield "plain text", row(ids, len(ids) // 2)
    yield from _held_out_rows(dataset, set(tokenizer.all_special_ids))


def row(ids: Sequence[int], start: int) -> tuple[Ids, int]:
    """The tokens before ``start``, shortened at their beginning, and then the one at ``start`` over and over."""
    before = tuple(int(i) for i in ids[max(start - PROMPT_TOKENS, 0) : start])
    return (*before, *[int(ids[start])] * REPEATS), len(before)


def _held_out_rows(
    dataset: Path | None, specials: AbstractSet[int]
) -> Iterator[tuple[str, tuple[Ids, int]]]:
    """Held-out answers, cut at their beginning or further on; never at a token that ends a turn."""
    from toolkit.data.store import TokenStore

    if dataset is None or not (dataset / "tokens" / "heldout").is_dir():
        return
    store = TokenStore(dataset / "tokens" / "heldout")
    for n in range(min(len(store), HELD_OUT_ROWS)):
        ids, trained = store[n].ids, store[n].trained.nonzero()[0]
        places = [int(p) for p in trained if p > 0 and int(ids[p]) not in specials]
        if places:
            yield f"held-out {n}", row(ids, places[n % 3 * len(places) // 3])


def _held_out(dataset: Path | None) -> list[dict[str, Any]]:
    file = dataset / "heldout.jsonl" if dataset else None
    if file is None or not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(HELD_OUT_ROWS), strict=False)]


def score(
    model: Any, ids: Sequence[int], start: int
) -> tuple[Logprobs, tuple[dict[int, float], ...]]:
    """Logprobs [N - start] of ``ids[start:]`` under a causal model, and the most likely ids at each place."""
    import torch

    tokens = torch.tensor(ids, dtype=torch.long, device=model.device)[None]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(-1, tokens[0, start:, None])[:, 0].tolist()
    best = logprobs.topk(min(TOP, logprobs.shape[-1]), -1)
    top = tuple(
        {int(i): round(lp, PLACES) for i, lp in zip(indices, values, strict=True)}
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return tuple(round(lp, PLACES) for lp in own), top


def _weights(folder: Path | None) -> str | None:
    return identity.weights_digest(folder) if folder else None


def _versions() -> dict[str, str]:
    found = {"toolkit": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- the folders that stages write ----------------------------------------------------------------


def of_base(folder: Path, device: str, *, trust_remote_code: bool = False) -> Reference:
    """Write the reference of a base as it was fetched."""
    return _of_complete(folder, "base", None, device, trust_remote_code=trust_remote_code)


def of_model(
    folder: Path, *, dataset: Path | None, device: str, trust_remote_code: bool = False
) -> Reference:
    """Write the reference of a complete model whose weights were all trained."""
    return _of_complete(folder, "model", dataset, device, trust_remote_code=trust_remote_code)


def _of_complete(
    folder: Path, kind: Kind, dataset: Path | None, device: str, *, trust_remote_code: bool
) -> Reference:
    from toolkit.evaluation.loading import release

    recorder = Recorder(folder, dataset, trust_remote_code=trust_remote_code)
    precision = "fp32"
    model, recorder.not_scored = _loaded(folder, device, trust_remote_code=trust_remote_code)
    if model is not None:
        precision = precision_of(model)
        recorder.score("model", model)
    del model
    reference = recorder.write(folder, kind, precision=precision)
    release(device)
    return reference


def of_adapter(
    output: Path,
    base: Path,
    *,
    facts: Mapping[str, Any],
    dataset: Path | None,
    device: str,
    trust_remote_code: bool = False,
) -> Reference:
    """Write the reference of an adapter folder: base alone, base and adapter, and known mistakes.

    Args:
        output: The adapter's folder, complete but for the reference.
        base: Folder of its base.
        facts: What training said: ``trained_on`` and ``precision``.
        dataset: Folder of the dataset artifact, if there is one.
        device: ``cpu`` or ``cuda``.
        trust_remote_code: Run Python code that lies in ``base``.
    """
    from peft import PeftModel

    from toolkit.evaluation.loading import release
    from toolkit.proof.faults import faults
    from toolkit.train.model import Numerics, load_base

    recorder = Recorder(base, dataset, trust_remote_code=trust_remote_code)
    trained_on = facts.get("trained_on")
    exact = _fits_exact(base, device)
    precision: Precision = "fp32" if exact else facts.get("precision", "bf16")
    numerics = Numerics(precision, trained_on == "nf4")
    model = load_base(base, numerics, device, trust_remote_code=trust_remote_code)
    recorder.score("beside", model)
    adapted = PeftModel.from_pretrained(model, str(output))
    recorder.score("model", adapted)
    for name in faults(adapted):
        recorder.score(name, adapted)
    del model, adapted
    release(device)
    return recorder.write(output, "adapter", precision=precision, trained_on=trained_on, base=base)


def precision_of(model: Any) -> str:
    """In what a loaded model computes: ``bf16``, ``fp16`` or ``fp32``."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(model.dtype), "fp32")


def _loaded(
    folder: Path, device: str, *, trust_remote_code: bool
) -> tuple[Any, None] | tuple[None, str]:
    """The model, or why the training side has no word on it."""
    from toolkit.evaluation.loading import load_model

    need, free = _memory(folder, device)
    if need > free * USED:
        shown = f"{need / 2**30:.0f} GiB of {free / 2**30:.0f} GiB"
        return None, f"it needs {shown} that are free on the {device}"
    try:
        exact = _fits_exact(folder, device)
        return load_model(folder, device, exact=exact, trust_remote_code=trust_remote_code), None
    except (ValueError, ImportError, OSError, RuntimeError, KeyError) as error:
        # not a causal language model, or packed in a way that transformers cannot read here
        return None, f"transformers cannot load it here: {str(error).splitlines()[0][:200]}"


def _fits_exact(folder: Path, device: str) -> bool:
    """Whether a model can compute in fp32 here, as it always does on a CPU.

    On a GPU the bf16 forward of Transformers was measured to be off by 0.05 to 0.11 nats a token, as far as an engine
    is: beside it a fault of the engine shows half as clearly.
    """
    from toolkit.evaluation.loading import quantization_method

    if device == "cpu":
        return True
    method = quantization_method(folder)
    if method not in (None, "compressed-tensors"):
        return False  # kernels of packed weights compute in 16 bits
    need, free = _memory(folder, device)
    return need * (2 if method is None else 8) <= free * USED  # packed: four bits at worst


def _memory(folder: Path, device: str) -> tuple[float, float]:
    """Bytes that a model needs as it is loaded by default, and bytes that are free."""
    import torch

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device == "cuda":
        return size * 1.1, float(torch.cuda.mem_get_info()[0])
    return size * 2.2, _available_memory()  # bf16 on disk, fp32 in memory


def _available_memory() -> float:
    """Bytes that Linux would give without swapping; no limit where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = next((line for line in lines if line.startswith("MemAvailable")), None)
    return float(found.split()[1]) * 1024 if found else float("inf")
