"""The proofs against an engine whose model is right, noisy or wrong on purpose."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest

from tests.unit.tiny_engine import VOCABULARY, TinyEngine, model, render
from toolkit.errors import ArtifactError, EngineError, ProofError
from toolkit.proof import ProofTarget, ServedAdapter, conversations, identity, proofs, reference
from toolkit.proof.certificate import certificate, metrics
from toolkit.proof.engine_calls import CALLS, SglangCalls, VllmCalls, as_sent, runs
from toolkit.proof.parity import first_difference, show
from toolkit.proof.reference import Reference, StoredConversation, StoredRow
from toolkit.proof.statistics import change, difference, divergence
from toolkit.proof.tolerance import bound, served_precision
from toolkit.proof.warming import buckets
from toolkit.recipe.proof import ProofSection

ANSWERS = Path(__file__).parent / "engine_answers"
LAYERS, HIDDEN = 4, 8
RIGHT, QUARTER = model(2.0), model(0.5)
RSLORA = "rsLoRA ignored (alpha / r instead of alpha / sqrt(r))"


# --- folders ---------------------------------------------------------------------------------------


def safetensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], float]]) -> Path:
    header, data = {}, b""
    for name, (shape, value) in tensors.items():
        raw = struct.pack("<f", value) * math.prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def lora(
    value: float = 1.0,
    prefix: str = "base_model.model.model",
    layers=range(LAYERS),
    width: int = HIDDEN,
):
    names = [f"{prefix}.layers.{n}.self_attn.q_proj" for n in layers]
    a = {f"{name}.lora_A.weight": ((2, width), 1.0) for name in names}
    return a | {f"{name}.lora_B.weight": ((HIDDEN, 2), value) for name in names}


def scored(ask, name: str = "row", beside=None, **faults) -> StoredRow:
    before, token = [ord(c) % VOCABULARY for c in name], 7
    ids = (*before, *[token] * 8)

    def own(logprobs):
        return tuple(logprobs(ids[:n])[token] for n in range(len(before), len(ids)))

    places = [ask(ids[:n]) for n in range(len(before), len(ids))]
    top = tuple(
        {i: lps[i] for i in sorted(range(VOCABULARY), key=lambda i: -lps[i])[:8]} for lps in places
    )
    wrong = {fault: own(logprobs) for fault, logprobs in faults.items()}
    return StoredRow(name, ids, len(before), own(ask), top, own(beside) if beside else None, wrong)


CHATS = tuple(
    StoredConversation(name, messages, ids=tuple(render(messages)))
    for name, messages in {
        "no system": ({"role": "user", "content": "hi"},),
        "system": ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}),
    }.items()
)


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(LAYERS)]
    safetensors(folder / "model.safetensors", dict.fromkeys(names, ((HIDDEN, HIDDEN), 1.0)))
    remember(folder, "base", [scored(model(), name) for name in ("one", "two")])
    return folder


def remember(folder: Path, kind, rows, base=None, chats=CHATS, **digests) -> Reference:
    known = identity.folder_digests(folder) | {
        "base": base and identity.weights_digest(base),
        "made_from": None,
    }
    stored = Reference(kind, known | digests, chats, tuple(rows), "fp32", "fp32")
    stored.write(folder)
    return stored


def adapter_folder(base: Path, tensors=None, ask=RIGHT, name="adapter", **config) -> Path:
    folder = base.parent / name
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4} | config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    safetensors(folder / "adapter_model.safetensors", tensors or lora())
    rows = [scored(ask, n, model(), **{RSLORA: QUARTER}) for n in ("one", "two", "three", "four")]
    remember(folder, "adapter", rows, base)
    return folder


def target(url: str, base: Path, **changes) -> ProofTarget:
    given = {
        "engine": "vllm",
        "model_id": "tickets-base",
        "name": "tickets-base",
        "max_length": 2048,
    }
    return ProofTarget(url=url, folder=base, **(given | changes))


def prove(
    base: Path, served, folder: Path | None = None, engine: TinyEngine | None = None, **changes
):
    """Prove one adapter: ``served`` is what the engine answers with, ``folder`` what it should be."""
    engine = engine or TinyEngine({"tickets-base": model(), "tickets@1": served})
    engine.models.setdefault("tickets@1", served)
    with engine.running() as url:
        asked = ServedAdapter("tickets", "tickets@1", folder or adapter_folder(base), "run1")
        return proofs.prove_adapter(target(url, base, **changes), asked)


# --- parity ----------------------------------------------------------------------------------------


def test_a_base_that_is_served_as_it_was_stored_is_proven(base):
    with TinyEngine({"tickets-base": model()}).running() as url:
        proof = proofs.prove_base(target(url, base))
    assert proof.parity.conversations == 2
    assert proof.agreement.mean < 1e-4
    assert proof.agreement.kl < 1e-4
    assert proof.agreement.precision == "bf16"
    assert proof.noise_mean == 0


def test_a_template_changed_by_one_space_is_stopped_at_its_token(base):
    with (
        TinyEngine({"tickets-base": model()}, space=" ").running() as url,
        pytest.raises(ProofError) as caught,
    ):
        proofs.prove_base(target(url, base))
    message = caught.value.message
    place = len(CHATS[0].ids)
    assert "'no system' is not what training saw" in message
    assert (
        f"token {place} differs ({place} tokens in training, {place + 1} on the server)" in message
    )
    assert "nothing: it ends here" in message
    assert f"'t{ord(' ')}' ({ord(' ')})" in message
    assert "may_differ" in caught.value.hint


def test_a_conversation_may_differ_when_the_recipe_says_so(base):
    settings = ProofSection(may_differ=("no system", "system"))
    with TinyEngine({"tickets-base": model()}, space=" ").running() as url:
        proof = proofs.prove_base(target(url, base, settings=settings))
    assert proof.parity.allowed == ("no system", "system")
    assert proof.parity.conversations == 0


def test_what_the_template_refuses_the_engine_must_refuse_too(base):
    chats = (dataclasses.replace(CHATS[1], ids=(), refused="System role not supported"), CHATS[0])
    remember(base, "base", [], chats=chats)
    renders = r"template refuses it .* and the server renders it"
    with (
        TinyEngine({"tickets-base": model()}).running() as url,
        pytest.raises(ProofError, match=renders),
    ):
        proofs.prove_base(target(url, base))
    with TinyEngine({"tickets-base": model()}, refuses="Be brief").running() as url:
        proof = proofs.prove_base(target(url, base))
    assert (proof.parity.refused, proof.parity.conversations) == (1, 2)
    assert proof.agreement is None, "nothing is stored: not checked"


def test_an_engine_that_refuses_what_training_renders_is_stopped(base):
    with TinyEngine({"tickets-base": model()}, refuses="Be brief").running() as url:
        with pytest.raises(ProofError, match="the server refuses it: System role not supported"):
            proofs.prove_base(target(url, base))
        short = target(url, base, max_length=len(CHATS[1].ids))
        assert proofs.prove_base(short).parity.too_long == ("system",)


def test_the_first_difference_is_shown_with_the_text_around_it():
    trained, served = [1, 2, 3, 4], [1, 2, 9]
    assert first_difference(trained, served) == 2
    assert first_difference(trained, trained) is None
    assert first_difference([1], [1, 2]) == 1
    shown = show(trained, served, 2, lambda i: f"<{i}>")
    assert shown.splitlines() == [
        "after '<1><2>'", "  training '<3>' (3) '<4>' (4)", "  server   '<9>' (9)",
    ]  # fmt: skip


# --- effect and agreement --------------------------------------------------------------------------


def test_an_adapter_that_is_served_as_trained_is_proven(base):
    proof = prove(base, RIGHT)
    assert proof.scale == pytest.approx(1, abs=1e-3)
    assert proof.unexplained < 1e-3
    assert proof.effect_mean > 0.5
    assert proof.agreement.mean < 1e-4
    assert proof.run_id == "run1"
    assert proof.digests["base"] == identity.weights_digest(base)


def test_the_engines_own_rounding_is_no_mistake(base):
    proof = prove(base, model(2.0, noise=0.02))
    assert 0.005 < proof.noise_mean < 0.1
    assert proof.agreement.mean < 0.1


def test_a_zero_adapter_answers_as_its_base_and_is_named(base):
    with pytest.raises(
        ProofError, match="all 4 matrices lora_B are zero: this adapter does nothing"
    ) as caught:
        prove(base, model(), adapter_folder(base, lora(0.0)))
    assert "answers as its base does" in caught.value.message
    assert caught.value.exit_code == 1


def test_a_mis_prefixed_adapter_is_named(base):
    folder = adapter_folder(base, lora(prefix="transformer.model"))
    with pytest.raises(ProofError, match=r"8 of 8 names do not begin with 'base_model.model.'"):
        prove(base, model(), folder)


def test_names_that_the_base_does_not_have_are_named(base):
    folder = adapter_folder(base, lora(prefix="base_model.model.language_model.model"))
    with pytest.raises(ProofError, match="4 of 4 layers it names are not in the base"):
        prove(base, model(), folder)


def test_an_adapter_that_the_engine_silently_did_not_load_is_stopped_even_if_its_files_are_right(
    base,
):
    with pytest.raises(ProofError, match="the engine loaded none of its weights"):
        prove(base, model())


def test_ignored_rslora_is_named_because_that_mistake_was_made_on_purpose(base):
    with pytest.raises(ProofError, match="rsLoRA ignored") as caught:
        prove(base, QUARTER)
    assert "is missing or wrong" in caught.value.message
    assert "from that mistake made on purpose" in caught.value.message


def test_a_wrong_scale_without_a_known_cause_is_called_partial(base):
    with pytest.raises(ProofError, match="part of the adapter is not applied") as caught:
        prove(base, model(1.2))
    assert "its size is 0." in caught.value.message


def test_missing_layers_are_counted(base):
    folder = adapter_folder(base, lora(layers=(0, 2)))
    with pytest.raises(ProofError, match="weights for 2 of 4 layers; layer 1 is the first"):
        prove(base, model(1.2), folder)


def test_other_weights_of_the_same_size_are_stopped(base):
    with pytest.raises(
        ProofError,
        match=r"other weights than those that were trained|part of the adapter is not applied",
    ):
        prove(base, model(2.0, seed=1))


def test_a_truncated_file_is_refused_before_anything_is_asked(base):
    folder = adapter_folder(base)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ProofError, match="cut off: 472 bytes of weights, and its header says 512"):
        proofs.require_loadable("tickets", folder, base)


def test_the_shape_of_another_base_is_refused_before_it_is_loaded(base):
    folder = adapter_folder(base, lora(width=16))
    with pytest.raises(
        ProofError,
        match=r"made for a base of another shape: .*lora_A.weight has 16, and the base 8",
    ):
        proofs.require_loadable("tickets", folder, base)


def test_another_base_of_the_same_shape_is_refused_by_its_digest(base):
    folder = adapter_folder(base)
    stored = reference.read(folder)
    dataclasses.replace(stored, digests={**stored.digests, "base": "f" * 64}).write(folder)
    with pytest.raises(
        ProofError, match="trained on another base: its weights have sha256 ffffffffffff"
    ):
        prove(base, RIGHT, folder)


def test_a_base_made_from_the_trained_one_is_accepted(base):
    folder = adapter_folder(base)
    trained_on = identity.weights_digest(base)
    safetensors(base / "model.safetensors", {"model.norm.weight": ((8,), 2.0)})
    remember(base, "model", [scored(model(), "one")], made_from=trained_on)
    assert prove(base, RIGHT, folder).agreement is not None


def test_another_base_under_the_right_name_is_stopped_by_its_logprobs(base):
    with (
        TinyEngine({"tickets-base": model(1.0, seed=9)}).running() as url,
        pytest.raises(ProofError, match=r"served logprobs differ from the training side by \d"),
    ):
        proofs.prove_base(target(url, base))


def test_a_folder_changed_after_the_export_is_refused(base):
    folder = adapter_folder(base)
    (folder / "chat_template.jinja").write_text("{{ messages }} ")
    with pytest.raises(
        ProofError, match="the chat template in its folder changed after the export"
    ):
        prove(base, RIGHT, folder)


def test_an_adapter_of_another_template_is_refused(base):
    folder = adapter_folder(base)
    (folder / "chat_template.jinja").write_text("{{ messages }} ")
    remember(folder, "adapter", [scored(RIGHT, "one", model())], base)
    with pytest.raises(ProofError, match="trained with another chat template than tickets-base"):
        prove(base, RIGHT, folder)


def test_an_adapter_without_a_reference_is_held_against_its_base_alone(base):
    folder = adapter_folder(base)
    (folder / "reference.json").unlink()
    proof = prove(base, RIGHT, folder)
    assert proof.agreement is None
    assert proof.scale is None
    assert proof.parity.conversations == 2
    with pytest.raises(ProofError, match="answers as its base does"):
        prove(base, model(), folder)
    with pytest.raises(ProofError, match=r"serve.proof.agreement is 'required'"):
        prove(base, RIGHT, folder, settings=ProofSection(agreement="required"))


def test_nothing_stored_at_all_still_shows_whether_the_adapter_acts(base):
    folder = adapter_folder(base)
    for place in (folder, base):
        (place / "reference.json").unlink()
    assert prove(base, RIGHT, folder).effect_mean > 0.5


def test_the_tolerance_of_the_recipe_wins(base):
    with pytest.raises(ProofError, match=r"bf16 explains 0.001"):
        prove(base, model(2.0, noise=0.02), settings=ProofSection(tolerance=0.001))


def test_requests_that_disturb_each_other_are_stopped(base):
    answers = iter([model(), *[model(2.0, seed=n) for n in range(9999)]])

    def disturbed(prefix):
        return next(answers)(prefix)

    engine = TinyEngine({"tickets-base": disturbed, "tickets@1": RIGHT})
    with pytest.raises(
        ProofError, match=r"tickets-base: its logprobs alone and in one batch with others differ"
    ):
        prove(base, RIGHT, engine=engine)


def test_an_unknown_adapter_is_the_engines_error(base):
    with TinyEngine({"tickets-base": model()}).running() as url:
        asked = ServedAdapter("tickets", "nobody", adapter_folder(base))
        with pytest.raises(EngineError, match="The model `nobody` does not exist"):
            proofs.prove_adapter(target(url, base), asked)


# --- the whole, and the certificate ----------------------------------------------------------------


def whole(base: Path, served=RIGHT):
    folder = adapter_folder(base)
    with TinyEngine({"tickets-base": model(), "tickets@1": served}).running() as url:
        adapters = (ServedAdapter("tickets", "tickets@1", folder, "run1"),)
        said: list[str] = []
        proof = proofs.prove(target(url, base, adapters=adapters), said.append)
    assert said == [
        "parity of tickets-base", "agreement of tickets-base", "parity of tickets", "effect of tickets", "warming up",
    ]  # fmt: skip
    return proof


def test_the_certificate_has_one_id_for_one_subject(base):
    first, second = whole(base), whole(base)
    given = [
        certificate([p], name="tickets", phases={"loading": 1.234}, fingerprints={"model": "0"})
        for p in (first, second)
    ]
    assert given[0]["id"] == given[1]["id"]
    assert given[0]["subject"]["engine"] == {"name": "vllm", "version": "0.32.0"}
    assert given[0]["subject"]["adapters"][0]["weights"] == first.adapters[0].digests["weights"]
    assert given[0]["phases"] == {"loading": 1.23}
    assert json.loads(json.dumps(given[0])) == given[0], "plain JSON"
    other = certificate([first], name="tickets", fingerprints={"model": "1"})
    assert other["id"] != given[0]["id"]


def test_servers_of_one_model_share_what_decides_an_answer(base):
    proof = whole(base)
    options = {"seed": None, "lock": "a"}

    def answers(proof=proof, *, name="tickets", options=options, **more):
        return certificate([proof], name=name, options=options, **more)["answers"]

    def other(**target):
        return dataclasses.replace(proof, target=dataclasses.replace(proof.target, **target))

    moved = other(url="http://127.0.0.1:1", name="another", run_id="run-9", model_id="x")
    shown = dataclasses.replace(moved, adapters=(), warm_up=None)
    same = answers()
    assert answers(shown, name="other", fingerprints={"model": "1"}, phases={"total": 2.0}) == same
    changed = [
        answers(other(max_length=7)),
        answers(other(dtype="fp16")),
        answers(other(engine="sglang")),
        answers(other(device="cuda")),
        answers(dataclasses.replace(proof, version="0.33.0")),
        answers(options={"seed": 1, "lock": "a"}),
        answers(options={"seed": None, "lock": "b"}),
    ]
    for part in ("weights", "template", "tokenizer"):
        digests = {**proof.base.digests, part: "0"}
        changed.append(
            answers(
                dataclasses.replace(proof, base=dataclasses.replace(proof.base, digests=digests))
            )
        )
    (base / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    changed.append(answers())
    assert len({same, *changed}) == 1 + len(changed)


def test_what_was_shown_of_an_adapter_is_told_and_what_was_not_too(base):
    adapter = whole(base).adapters[0]
    agreed = adapter.agreement
    assert adapter.told == (
        f"parity of {adapter.parity.conversations} conversations; "
        f"effect {adapter.effect_mean:.3g} nats a token; "
        f"agreement with the training side {agreed.mean:.2g} nats (bound {agreed.tolerance:g})"
    )
    foreign = dataclasses.replace(adapter, agreement=None, parity=None).told
    assert "parity not checked" in foreign
    assert foreign.endswith(
        "agreement with the training side NOT CHECKED: it brings no stored logprobs"
    )


def test_adapters_come_and_go_in_a_proof(base):
    proof = whole(base)
    newer = dataclasses.replace(proof.adapters[0], model_id="tickets@2")
    both = proof.with_adapter(newer)
    assert [a.model_id for a in both.adapters] == ["tickets@1", "tickets@2"]
    assert [a.model_id for a in both.without_adapter("tickets@1").adapters] == ["tickets@2"]
    assert len(both.with_adapter(newer).adapters) == 2


def test_the_proofs_are_metrics_of_the_run(base):
    numbers = metrics(whole(base))
    assert numbers["proof_parity_conversations"] == 4
    assert numbers["proof_kl"] < 1e-4
    assert numbers["proof_effect"] > 0.5
    assert {"proof_difference", "proof_max_difference", "proof_seconds", "warm_up_seconds"} <= set(
        numbers
    )


def test_every_adapter_is_warmed_at_each_length(base):
    assert buckets(4096) == (16, 512, 4080)
    assert buckets(300) == (16, 284)
    folder = adapter_folder(base)
    with TinyEngine({"tickets-base": model(), "tickets@1": RIGHT}).running() as url:
        asked = target(
            url, base, adapters=(ServedAdapter("t", "tickets@1", folder),), device="cuda"
        )
        warmed = proofs.warm_up(asked)
        alone = proofs.warm_up(asked, asked.adapters)
    assert {m: sorted(t) for m, t in warmed.seconds.items()} == {
        "tickets-base": [16, 512, 2032], "tickets@1": [16, 512],
    }  # fmt: skip
    assert list(alone.seconds) == ["tickets@1"]


def test_a_model_without_a_chat_template_is_proven_and_warmed(base):
    (base / "reference.json").unlink()
    folder = adapter_folder(base)
    (folder / "reference.json").unlink()
    engine = TinyEngine({"tickets-base": model(), "tickets@1": RIGHT}, has_template=False)
    with engine.running() as url:
        adapter = ServedAdapter("tickets", "tickets@1", folder)
        shown = proofs.prove(target(url, base, adapters=(adapter,)))
    assert shown.base.parity is None
    assert shown.adapters[0].effect_mean > 0.1
    assert set(shown.warm_up.seconds) == {"tickets-base", "tickets@1"}


# --- engines ---------------------------------------------------------------------------------------


def test_vllm_is_made_to_write_the_stored_tokens():
    ids, places = [1, 9690, 198, 2683, 359, 253, 253, 253], range(5, 8)
    (request,) = VllmCalls().score("tickets", "tickets-base", ids, places)
    assert request.path == "/v1/completions"
    assert request.body["prompt"] == ids[:5]
    assert request.body["allowed_token_ids"] == [253]
    assert request.body["max_tokens"] == 3
    assert "prompt_logprobs" not in request.body, (
        "it kills vLLM 0.32 on a CPU when adapters are loaded"
    )
    answer = json.loads((ANSWERS / "vllm-0.32.0-completions.json").read_text())
    scored = VllmCalls().scored([answer], ids, places)
    assert scored.logprobs == pytest.approx((-0.52976, -12.4137, -10.93951), abs=1e-4)
    assert len(scored.top[1]) == 8
    assert 253 not in scored.top[1], "a forced token that is unlikely is none of the most likely"
    with pytest.raises(EngineError, match="but was asked for"):
        VllmCalls().scored([answer], [*ids[:5], 9, 9, 9], places)


def test_sglang_scores_prompt_tokens_under_the_adapters_own_name():
    ids, places = [1, 9690, 198, 2683, 359, 253, 5356], range(4, 7)
    (request,) = SglangCalls().score("tickets-base:tickets@1", "tickets-base", ids, places)
    assert request.path == "/generate"
    assert request.body["lora_path"] == "tickets@1"
    (plain,) = SglangCalls().score("tickets-base", "tickets-base", ids, places)
    assert "lora_path" not in plain.body
    answer = json.loads((ANSWERS / "sglang-0.5.17-generate.json").read_text())
    scored = SglangCalls().scored([answer], ids, places)
    assert scored.logprobs == pytest.approx((-0.695, -1.5127, -3.025), abs=1e-3)
    assert scored.top[1] == pytest.approx({354: -0.57516, 253: -1.51266}, abs=1e-4)


def test_equal_tokens_are_one_request():
    assert runs([1, 5, 5, 5, 6], [1, 2, 3, 4]) == [range(1, 4), range(4, 5)]
    assert runs([1, 5, 5, 5], [1, 3]) == [range(1, 2), range(3, 4)]


def test_tool_calls_are_sent_as_a_client_sends_them():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    (sent,) = as_sent([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert sent["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    ]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_template_variables_and_tools_are_passed_on(engine):
    request = CALLS[engine]().tokenize(
        "m", [{"role": "user", "content": "x"}], [{"a": 1}], {"t": True}
    )
    assert request.path == "/tokenize"
    assert request.body["tools"] == [{"a": 1}]
    assert request.body["chat_template_kwargs"] == {"t": True}
    assert ("add_generation_prompt" in request.body) == (engine == "vllm")


# --- what is stored --------------------------------------------------------------------------------


def test_the_stored_conversations_cover_what_servers_get_wrong():
    found = {c.name: c for c in conversations.stored("{{ enable_thinking }}", ["<bos>"])}
    assert list(found) == [
        "no system", "system", "multi-turn", "tools", "tool result", "thinking on", "thinking off", "empty turn",
        "long turn", "very long turn", "special tokens", "CJK", "emoji", "white space",
    ]  # fmt: skip
    assert found["thinking off"].kwargs == {"enable_thinking": False}
    assert found["tool result"].messages[-1]["role"] == "tool"
    assert found["empty turn"].messages[-1]["content"] == ""
    assert "<bos>" in found["special tokens"].messages[0]["content"]
    assert len(found["very long turn"].messages[0]["content"]) > 5000
    assert all(c.messages[-1]["role"] in ("user", "tool") for c in found.values())
    assert not {"thinking on", "thinking off"} & {c.name for c in conversations.stored("plain")}


def test_held_out_rows_are_asked_as_a_client_asks():
    said = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    messages = [{"role": role, "content": text, "weight": 0} for role, text in said]
    row = {"id": "7", "messages": messages}
    (found,) = conversations.held_out([{"id": "6", "text": "plain"}, row], 3)
    assert found.name == "held-out 7"
    assert [sorted(m) for m in found.messages] == [["content", "role"]] * 3


def test_a_reference_reads_as_it_was_written(tmp_path, base):
    stored = reference.read(base)
    folder = tmp_path / "copy"
    folder.mkdir()
    stored.write(folder)
    assert reference.read(folder) == stored
    assert reference.read(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ('{"schema": 9}', "has format 9"), ('{"schema": 1}', "is damaged")],
)
def test_a_reference_that_cannot_be_read_is_said_to_be_so(tmp_path, text, said):
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        reference.read(tmp_path)


def test_an_adapters_version_follows_weights_and_scale_and_not_its_name(base):
    folder = adapter_folder(base)
    before = identity.adapter_version(folder)
    assert len(before) == 16
    adapter_folder(base, base_model_name_or_path="elsewhere")
    assert identity.adapter_version(folder) == before
    adapter_folder(base, lora_alpha=8)
    assert identity.adapter_version(folder) != before


# --- numbers ---------------------------------------------------------------------------------------


def test_differences_of_what_never_happens_do_not_count():
    assert difference([-30.0, -1.0], [-12.0, -1.5]) == (0.25, 0.5)
    assert difference([float("nan")], [-10.0]).max == 10


def test_divergence_is_zero_for_the_same_and_a_lower_bound_otherwise():
    p = {1: math.log(0.5), 2: math.log(0.3)}
    assert divergence([p], [p]) == 0
    q = {1: math.log(0.25), 3: math.log(0.7)}
    assert divergence([p], [q]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_the_scale_of_a_change_is_its_projection():
    seen = change([0.5, -0.5], [2.0, -2.0])
    assert seen.scale == 0.25
    assert seen.unexplained == 0.75


@pytest.mark.parametrize(
    ("config", "dtype", "precision"),
    [
        ({"dtype": "bfloat16"}, "auto", "bf16"),
        ({"torch_dtype": "float16"}, "auto", "fp16"),
        ({"dtype": "float32"}, "auto", "bf16"),
        ({"dtype": "bfloat16"}, "fp32", "fp32"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "auto", "int4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "auto", "int8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "auto", "int4"),
        ({"quantization_config": {"quant_method": "compressed-tensors",
          "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}}}, "auto", "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors",
          "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}}, "auto", "int4"),
    ],
)  # fmt: skip
def test_the_precision_is_that_of_the_weights_as_they_are_served(
    tmp_path, config, dtype, precision
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert served_precision(tmp_path, dtype) == precision


def test_bounds_are_wider_where_the_weights_are_not_those_of_the_training_side(base):
    asked, stored = target("http://127.0.0.1:1", base), reference.read(base)
    assert bound(asked, stored) == (0.12, "bf16")
    nf4 = dataclasses.replace(stored, trained_on="nf4")
    assert bound(asked, nf4) == (1.5, "int4 base")
    rounded = dataclasses.replace(stored, precision="bf16")
    assert bound(asked, rounded) == (0.2, "bf16"), "both sides round"
    packed = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps({"quantization_config": packed}))
    assert bound(asked, stored) == (0.2, "int4"), "its own forward"
    on_full = dataclasses.replace(stored, digests={**stored.digests, "base": "f" * 64})
    assert bound(asked, on_full, "0" * 64) == (1.5, "int4 base")
    assert bound(dataclasses.replace(asked, settings=ProofSection(tolerance=0.3)), nf4)[0] == 0.3
