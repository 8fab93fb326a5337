"""Packed rows do not see each other, and the loss is what it says."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from toolkit.data.store import TokenRow, TokenStore
from toolkit.recipe.train import TrainSection
from toolkit.train.batches import collate
from toolkit.train.heldout import heldout_loss
from toolkit.train.loss import summed_loss
from toolkit.train.model import Numerics
from toolkit.train.parallel.engine import Engine
from toolkit.train.parallel.ranks import Ranks

pytestmark = pytest.mark.integration
PACKED = [[0, 1, 2], [3, 4], [5]]  # three sequences in one batch, of different lengths


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, base):
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation=request.param).eval()


@pytest.fixture(scope="module")
def store(dataset):
    return TokenStore(dataset / "tokens" / "train")


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, TrainSection(method="full"), Numerics("fp32", False), Ranks())


def alone(model, row):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(np.array(row.ids))[None].long(), use_cache=False
        ).logits[0]


def together(model, batch, **arguments):
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(batch.ids),
            position_ids=torch.from_numpy(batch.positions),
            **({"use_cache": False} | arguments),
        ).logits


def largest_difference(model, store, sequences, logits):
    worst = 0.0
    for line, rows in enumerate(sequences):
        start = 0
        for row in rows:
            length = len(store[row].ids)
            difference = logits[line, start : start + length] - alone(model, store[row])
            worst = max(worst, float(difference.abs().max()))
            start += length
    return worst


@pytest.mark.parametrize("sequences", [[[0, 1, 2]], PACKED, [[0], [1], [2]]])
def test_logits_of_packed_rows_are_those_of_the_rows_alone(model, store, sequences):
    logits = together(model, collate(store, sequences))
    assert largest_difference(model, store, sequences, logits) < 1e-4


def test_the_comparison_would_see_a_leak(model, store):
    batch = collate(store, PACKED)
    logits = together(model, batch, attention_mask=torch.ones(batch.ids.shape, dtype=torch.long))
    assert largest_difference(model, store, PACKED, logits) > 0.1


def test_a_changed_row_changes_no_loss_of_its_neighbours(model, store, tmp_path):
    rows = [store[i] for i in range(3)]
    other = TokenRow((np.array(rows[1].ids) + 17) % 96, rows[1].trained)
    silent = [
        r._replace(trained=np.zeros_like(r.trained)) if i == 1 else r for i, r in enumerate(rows)
    ]
    TokenStore.write(tmp_path / "a", silent)
    TokenStore.write(
        tmp_path / "b", [silent[0], other._replace(trained=silent[1].trained), silent[2]]
    )
    with torch.no_grad():
        losses = [
            float(summed_loss(model, collate(TokenStore(tmp_path / name), [[0, 1, 2]])))
            for name in "ab"
        ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_loss_is_the_library_s_own_on_the_same_targets(model, engine, store):
    total, tokens = 0.0, 0
    for sequence in PACKED:
        for number in sequence:
            row = store[number]
            ids = torch.tensor(np.array(row.ids))[None].long()
            labels = torch.where(torch.tensor(np.array(row.trained))[None], ids, -100)
            count = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * count
            tokens += count
    batch = collate(store, PACKED)
    assert batch.trained_tokens == tokens
    with torch.no_grad():
        assert float(summed_loss(model, batch)) == pytest.approx(total, rel=1e-5)
    assert heldout_loss(engine, store, [PACKED]) == pytest.approx(total / tokens, rel=1e-5)


def test_mean_over_batches_weighs_tokens_and_not_batches(engine, store):
    one = heldout_loss(engine, store, [[[0, 1, 2, 3]]])
    parts = heldout_loss(engine, store, [[[0, 1, 2]], [[3]]])
    assert parts == pytest.approx(one, rel=1e-5)


def test_logits_are_made_for_targets_only(model, store):
    batch = collate(store, PACKED)
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda _m, _a, logits: seen.append(tuple(logits.shape))
    )
    summed_loss(model, batch)
    handle.remove()
    assert seen == [(batch.trained_tokens, 96)]


def test_gradients_are_those_of_the_full_logits(base, store):
    batch = collate(store, PACKED)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    summed_loss(ours, batch).backward()
    logits = theirs(
        input_ids=torch.from_numpy(batch.ids),
        position_ids=torch.from_numpy(batch.positions),
        use_cache=False,
    ).logits.flatten(0, 1)
    picked = logits[torch.from_numpy(batch.sources)]
    torch.nn.functional.cross_entropy(
        picked, torch.from_numpy(batch.targets), reduction="sum"
    ).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
