"""The evaluate stage on a random small model: scores, adapter, resume, perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from toolkit.errors import DataError, NotInstalledError
from toolkit.stages import Input, Kind, StageContext, StageResult
from toolkit.stages.evaluate import Evaluate, EvaluateConfig

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]


def evaluate(
    model: Path, dataset: Path, folder: Path, adapter: Path | None = None, out: str = "out", **keys
) -> StageResult:
    config = EvaluateConfig.model_validate(
        {
            "subject": "tuned", "metrics": ("exact_match", "perplexity"), "max_rows": 100, "max_new_tokens": 6,
            "batch_size": 5, "max_length": 256, "through": "transformers", **keys,
        }
    )  # fmt: skip
    inputs = {"model": Input(model, Kind.model, "m"), "dataset": Input(dataset, Kind.dataset, "d")}
    if adapter:
        inputs["adapter"] = Input(adapter, Kind.adapter, "a")
    for name in (out, "state"):
        (folder / name).mkdir(exist_ok=True)
    with (folder / "events").open("w") as events:
        return Evaluate().run(
            config, StageContext(inputs, folder / out, folder / "state", folder, events=events)
        )


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def spoken(tmp_path: Path) -> str:
    """A user's metric that is the length of the answer."""
    (tmp_path / "mine.py").write_text(
        "def spoken(prediction, reference, row):\n    return len(prediction)\n"
    )
    return "mine.py:spoken"


def test_every_row_is_answered_and_scored(
    tiny_model: Path, dataset: Path, tmp_path: Path, spoken: str
):
    result = evaluate(tiny_model, dataset, tmp_path, metrics=("exact_match", spoken, "perplexity"))
    rows = read_rows(tmp_path / "out")
    assert result.metrics["rows"] == len(rows) == 12
    assert set(rows[0]) == {"id", "prompt", "prediction", "reference", "scores"}
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert result.metrics[spoken] == sum(len(row["prediction"]) for row in rows) / 12 > 0
    assert 1 < result.metrics["perplexity"] < 512
    low, high = result.facts["ci95"]["perplexity"]
    assert low <= result.metrics["perplexity"] <= high
    assert f"| {spoken} |" in (tmp_path / "out" / "report.md").read_text()


def test_batches_and_padding_do_not_change_an_answer(
    tiny_model: Path, dataset: Path, tmp_path: Path
):
    found = []
    for size in (1, 5, 12):
        (tmp_path / str(size)).mkdir()
        result = evaluate(tiny_model, dataset, tmp_path / str(size), batch_size=size)
        found.append(
            (
                [r["prediction"] for r in read_rows(tmp_path / str(size) / "out")],
                result.metrics["perplexity"],
            )
        )
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] == pytest.approx(found[2][1], rel=1e-4)


def test_perplexity_is_that_of_the_trained_tokens(tiny_model: Path, dataset: Path, tmp_path: Path):
    import torch

    from toolkit.data.store import TokenStore
    from toolkit.evaluation.loading import load_model

    result = evaluate(tiny_model, dataset, tmp_path, metrics=("perplexity",))
    model, store = load_model(tiny_model, "cpu"), TokenStore(dataset / "tokens" / "heldout")
    total, count = 0.0, 0
    for index in range(len(store)):
        ids = torch.from_numpy(store[index].ids.astype("int64"))[None]
        with torch.inference_mode():
            likelihoods = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(1, ids.shape[1]):
            if store[index].trained[place]:
                total -= float(likelihoods[place - 1, ids[0, place]])
                count += 1
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_an_adapter_changes_the_answers_like_its_merged_model(
    tiny_model: Path, dataset: Path, tmp_path: Path
):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(3)
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "whole")
    scores = {}
    for name, folder, adapter in (
        ("base", tiny_model, None),
        ("tuned", tiny_model, tmp_path / "adapter"),
        ("merged", tmp_path / "whole", None),
    ):
        (tmp_path / name).mkdir()
        scores[name] = evaluate(
            folder, dataset, tmp_path / name, adapter, metrics=("perplexity",)
        ).metrics["perplexity"]
    assert scores["tuned"] == pytest.approx(scores["merged"], rel=1e-3)
    assert abs(scores["tuned"] / scores["base"] - 1) > 0.01


def test_an_interrupted_evaluation_goes_on_where_it_was(
    tiny_model: Path, dataset: Path, tmp_path: Path
):
    (tmp_path / "whole").mkdir()
    whole = evaluate(tiny_model, dataset, tmp_path / "whole")
    (tmp_path / "late.py").write_text(
        "seen = []\ndef late(prediction, reference, row):\n"
        "    seen.append(1)\n    if len(seen) > 7:\n        raise KeyboardInterrupt\n    return 0\n"
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            tiny_model, dataset, tmp_path, metrics=("exact_match", "late.py:late", "perplexity")
        )
    kept = [
        json.loads(line) for line in (tmp_path / "state" / "answers.jsonl").read_text().splitlines()
    ]
    assert len(kept) == 7
    again = evaluate(tiny_model, dataset, tmp_path, out="again")
    assert "7 rows were scored before the interruption" in (tmp_path / "events").read_text()
    assert again.metrics["exact_match"] == whole.metrics["exact_match"]
    assert [r["prediction"] for r in read_rows(tmp_path / "again")] == [
        r["prediction"] for r in read_rows(tmp_path / "whole" / "out")
    ]


def test_a_finished_evaluation_loads_no_model_again(
    tiny_model: Path, dataset: Path, tmp_path: Path
):
    first = evaluate(tiny_model, dataset, tmp_path)
    second = evaluate(tiny_model, dataset, tmp_path, out="again")
    assert first.metrics == second.metrics
    assert "loading the model" not in (tmp_path / "events").read_text()


def test_a_question_without_room_for_an_answer_is_refused(
    tiny_model: Path, dataset: Path, tmp_path: Path
):
    with pytest.raises(
        DataError, match=r"and model\.max_length is 8: there is no room for an answer"
    ):
        evaluate(tiny_model, dataset, tmp_path, max_length=8)


def test_rows_without_an_answer_are_refused_for_metrics_of_answers(
    tiny_model: Path, tmp_path: Path
):
    (tmp_path / "heldout.jsonl").write_text('{"id": "1", "text": "plain"}\n')
    with pytest.raises(
        DataError, match="none of the 1 held-out rows ends with an assistant's answer"
    ):
        evaluate(tiny_model, tmp_path, tmp_path, metrics=("exact_match",))


def test_an_engine_without_environment_is_named(tiny_model: Path, dataset: Path, tmp_path: Path):
    pytest.importorskip("toolkit.engines.server")
    with pytest.raises(
        NotInstalledError,
        match="evaluate goes through the engine vllm, which has no environment here",
    ):
        evaluate(
            tiny_model,
            dataset,
            tmp_path,
            through="engine",
            engine={"engine": "vllm"},
            metrics=("exact_match",),
        )
