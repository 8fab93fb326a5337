"""The outbox: what was written stays, in order, whoever dies when."""

import json
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from toolkit.tracking.deliver import METRICS_AT_ONCE, _batches
from toolkit.tracking.describe import PARAM_LIMIT, flatten, git_state
from toolkit.tracking.outbox import Delivered, Outbox, Record
from toolkit.tracking.replay import sync

ROOT = Path(__file__).parents[2]


def test_records_come_back_in_order_from_any_offset(tmp_path):
    box = Outbox.create(tmp_path, "train")
    for step in range(5):
        box.put("metrics", step=step)
    records = list(box.records(0))
    assert [r.values["step"] for r in records] == [0, 1, 2, 3, 4]
    assert [r.values["step"] for r in box.records(records[2].end)] == [3, 4]
    box.remove()


def test_a_torn_last_line_is_passed_over_and_the_next_record_is_whole(tmp_path):
    box = Outbox.create(tmp_path, "train")
    box.put("metrics", step=0)
    file = box.folder / "outbox.jsonl"
    file.write_bytes(file.read_bytes() + b'{"op": "metr')
    assert [r.values for r in box.records(0)] == [{"step": 0}]
    box.mend()
    box.put("finish", status="KILLED")
    assert [r.op for r in box.records(0)] == ["metrics", "finish"]
    box.release()


def test_what_was_delivered_is_remembered(tmp_path):
    box = Outbox.create(tmp_path, "train")
    assert box.delivered == Delivered()
    noted = box.note(box.delivered, run_id="abc", offset=7, refused=("why",))
    assert box.delivered == noted == Delivered("abc", None, 7, False, ("why",))
    box.release()


def test_an_outbox_has_one_holder_and_a_killed_holder_frees_it(tmp_path):
    code = """
import sys, time
from pathlib import Path
from toolkit.tracking.outbox import Outbox
box = Outbox.create(Path(sys.argv[1]), "x")
box.put("create")
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        box = Outbox(next(tmp_path.iterdir()))
        assert not box.hold()
        assert sync(tmp_path) == []
        holder.kill()
        holder.wait()
        assert box.hold()
        box.release()


def test_an_outbox_that_nobody_wrote_into_yet_is_left_alone(tmp_path):
    (tmp_path / "new").mkdir()
    assert sync(tmp_path) == []
    assert (tmp_path / "new").exists()


def test_outboxes_are_for_their_owner_alone(tmp_path):
    box = Outbox.create(tmp_path / "tracking", "x")
    assert box.folder.stat().st_mode & 0o077 == 0
    box.remove()
    assert list((tmp_path / "tracking").iterdir()) == []


@given(st.lists(st.sampled_from([("metrics", 3), ("metrics", 700), ("tags", 0)]), max_size=12))
def test_batches_keep_every_record_in_order_and_within_the_limit(kinds):
    records = [
        Record(op, {"metrics": dict.fromkeys(range(n), 1.0)}, i) for i, (op, n) in enumerate(kinds)
    ]
    batches = list(_batches(records))
    assert [r for batch in batches for r in batch] == records
    for batch in batches:
        assert len({r.op for r in batch}) == 1
        assert batch[0].op == "metrics" or len(batch) == 1
        assert sum(len(r.values["metrics"]) for r in batch) <= METRICS_AT_ONCE


def test_settings_become_dotted_parameters():
    config = {
        "train": {"lora": {"rank": 8, "targets": ["q", "v"]}, "resume": None, "on": True},
        "empty": {},
        "sources": [{"path": "a"}, {"path": "b"}],
        "name": "x",
    }
    assert flatten(config) == {
        "train.lora.rank": "8",
        "train.lora.targets": '["q", "v"]',
        "train.resume": "null",
        "train.on": "true",
        "empty": "{}",
        "sources.0.path": "a",
        "sources.1.path": "b",
        "name": "x",
    }


def test_a_long_parameter_is_cut_and_says_where_the_whole_is():
    value = flatten({"prompt": "x" * 10_000})["prompt"]
    assert len(value) == PARAM_LIMIT
    assert value.endswith("(whole value: config.json)")


KEYS = st.sampled_from(["a", "b", "c"])


@given(
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1), max_leaves=6
    )
)
def test_every_leaf_becomes_one_parameter(value):
    def leaves(v):
        return sum(map(leaves, v.values())) if isinstance(v, dict) else 1

    assert len(flatten({"root": value})) == leaves(value)


def _git(folder, *args):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@t", *args],
        check=True,
        capture_output=True,
    )


def test_commit_and_diff_are_told_and_no_repository_is_fine(tmp_path):
    assert git_state(tmp_path) is None
    _git(tmp_path, "init")
    (tmp_path / "a.yaml").write_text("rank: 8\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "x")
    clean = git_state(tmp_path)
    assert len(clean.commit) == 40
    assert clean.diff == ""
    assert clean.tags["toolkit.git.dirty"] == "false"
    (tmp_path / "a.yaml").write_text("rank: 16\n")
    assert "+rank: 16" in git_state(tmp_path).diff
    (tmp_path / "a.yaml").write_text("y" * 3_000_000)
    assert len(git_state(tmp_path).diff) < 1_100_000


def test_records_are_plain_json(tmp_path):
    box = Outbox.create(tmp_path, "x")
    box.put("metrics", step=1, metrics={"loss": float("nan")})
    assert json.loads((box.folder / "outbox.jsonl").read_text())["op"] == "metrics"
    box.remove()
