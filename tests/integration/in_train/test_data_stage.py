"""The data stage as a whole, on a small tokenizer. Runs in the train environment."""

import json

import pytest

pytest.importorskip("transformers", reason="runs in the train environment")

from templates import CHATML, THINKING, tokenizer

from toolkit.data.store import TokenStore
from toolkit.errors import DataError
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.data import Data, DataConfig

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {}
    for name, template in (("chatml", CHATML), ("thinking", THINKING), ("none", None)):
        found[name] = tmp_path_factory.mktemp(name)
        tok = tokenizer(template or "x")
        tok.chat_template = template
        tok.save_pretrained(found[name])
        eos = tok.convert_tokens_to_ids("<|im_end|>")
        (found[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return found


@pytest.fixture
def run(models, tmp_path):
    def go(*, model="chatml", max_length=128, name="out", **data):
        output = tmp_path / name
        output.mkdir()
        events = (tmp_path / "events").open("w")
        ctx = StageContext(
            {"model": Input(models[model], Kind.model, "x")},
            output,
            tmp_path,
            tmp_path,
            events=events,
        )
        section = {"sources": [{"path": "a.jsonl"}], **data}
        with events:
            result = Data().run(
                DataConfig.model_validate({"data": section, "max_length": max_length, "seed": 0}),
                ctx,
            )
        return output, result

    return go


def rows(tmp_path, number, answer="It is on its way.", name="a.jsonl"):
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Where is order {n}?"},
                {"role": "assistant", "content": answer if isinstance(answer, str) else answer(n)},
            ]
        }
        for n in range(number)
    ]
    (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in lines))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_line_and_token_row_belong_together(run, tmp_path):
    rows(tmp_path, 50)
    output, result = run(heldout={"fraction": 0.2})
    tok = tokenizer(CHATML)
    for side in ("train", "heldout"):
        store, written = TokenStore(output / "tokens" / side), lines(output / f"{side}.jsonl")
        assert len(store) == len(written) > 0
        for row, tokens in zip(written, store, strict=True):
            own = tok.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
            assert tokens.ids.tolist() == own
            assert (
                tok.decode(tokens.ids[tokens.trained])
                == row["messages"][-1]["content"] + "<|im_end|>"
            )
            assert len(row["id"]) == 16
    assert result.facts["rows"] + result.facts["heldout_rows"] == 50
    assert result.facts["stop_token"] == "<|im_end|>"
    assert result.metrics["stop_token_share"] == 1.0
    assert result.metrics["rows_in"] == 50


def test_a_second_run_gives_the_same_bytes(run, tmp_path):
    rows(tmp_path, 30)
    (one, first), (two, second) = run(name="one"), run(name="two")
    assert first.facts == second.facts
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(names) == 10
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


def test_a_weight_of_two_writes_each_training_row_twice(run, tmp_path):
    rows(tmp_path, 20)
    output, result = run(sources=[{"path": "a.jsonl", "weight": 2}], heldout={"fraction": 0})
    ids = [row["id"] for row in lines(output / "train.jsonl")]
    assert len(ids) == 40 == len(TokenStore(output / "tokens" / "train"))
    assert all(ids.count(i) == 2 for i in ids)
    assert result.metrics["rows_train"] == 40
    assert "no row is held out" in (tmp_path / "events").read_text()


def long_at(*which):
    return lambda n: "word " * (200 if n in which else 1)


def test_long_rows_are_dropped_and_counted(run, tmp_path):
    rows(tmp_path, 40, long_at(3))
    _, result = run(heldout={"fraction": 0})
    assert result.metrics["rows_too_long"] == 1
    assert result.metrics["rows_train"] == 39
    assert result.facts["longest_row"] <= 128


def test_too_many_dropped_rows_stop_the_run_and_name_lines(run, tmp_path):
    rows(tmp_path, 20, long_at(3, 7))
    with pytest.raises(DataError) as error:
        run(heldout={"fraction": 0})
    assert error.value.message.startswith(
        "2 rows of 20 (10.00%) were dropped (2 too long), but data.max_dropped allows 5.00%\n  a.jsonl:4: "
    )
    assert "tokens, model.max_length is 128\n  a.jsonl:8: " in error.value.message


def test_long_rows_are_refused_with_their_lines(run, tmp_path):
    rows(tmp_path, 40, long_at(3))
    with pytest.raises(DataError) as error:
        run(on_too_long="refuse", heldout={"fraction": 0})
    assert error.value.message.startswith(
        "1 row of 40 is longer than model.max_length 128:\n  a.jsonl:4: "
    )
    assert error.value.hint == "raise model.max_length, or set data.on_too_long to drop or truncate"


def test_truncated_rows_lose_their_stop_token_and_that_is_said(run, tmp_path):
    rows(tmp_path, 40, long_at(3))
    output, result = run(on_too_long="truncate", heldout={"fraction": 0})
    assert result.metrics["rows_truncated"] == 1
    assert result.metrics["stop_token_share"] == 39 / 40
    assert max(len(row.ids) for row in TokenStore(output / "tokens" / "train")) == 128
    assert (
        "only 39 of 40 answers (97.5%) train their stop token" in (tmp_path / "events").read_text()
    )


def test_a_truncated_row_without_a_trained_token_is_dropped_and_counted(run, tmp_path):
    question = {"role": "user", "content": "word " * 300}
    rows(tmp_path, 40)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(
            json.dumps({"messages": [question, {"role": "assistant", "content": "ok"}]}) + "\n"
        )
    _, result = run(on_too_long="truncate", heldout={"fraction": 0})
    assert result.metrics["rows_without_trained_token"] == 1
    assert result.metrics["rows_truncated"] == 0


def test_a_thinking_template_makes_more_sequences_than_rows(run, tmp_path):
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    output, result = run(model="thinking", heldout={"fraction": 0})
    assert [len(row["messages"]) for row in lines(output / "train.jsonl")] == [4, 2]
    assert result.metrics["stop_token_share"] == 1.0
    assert "1 conversations became 2 sequences" in (tmp_path / "events").read_text()


def test_a_model_without_chat_template_trains_text_and_refuses_conversations(run, tmp_path):
    rows(tmp_path, 3)
    with pytest.raises(DataError, match="the model has no chat template"):
        run(model="none", name="one")
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n{"text": "there"}\n')
    _, result = run(model="none", name="two", heldout={"fraction": 0})
    assert result.metrics["tokens_trained"] == result.metrics["tokens_train"] > 0


def test_parquet_rows_are_read(run, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"name": "find", "arguments": "{}"}
    asked = {"role": "user", "content": "a", "tool_calls": None}
    pq.write_table(
        pa.Table.from_pylist(
            [
                {"messages": [asked, {"role": "assistant", "content": "b", "tool_calls": None}]},
                {"messages": [asked, {"role": "assistant", "content": "c", "tool_calls": [call]}]},
            ]
        ),
        tmp_path / "a.parquet",
    )
    output, _ = run(model="thinking", sources=[{"path": "a.parquet"}], heldout={"fraction": 0})
    first, second = lines(output / "train.jsonl")
    assert first["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert second["messages"][1]["tool_calls"][0]["function"]["name"] == "find"


def test_a_file_that_is_no_parquet_is_refused(run, tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file"):
        run(sources=[{"path": "a.parquet"}])


def test_a_hub_dataset_that_cannot_be_reached_is_explained(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = {"hub": "nobody/nothing-like-this", "revision": "0" * 40}
    with pytest.raises(DataError, match="the Hub dataset nobody/nothing-like-this at 0000"):
        run(sources=[source])
