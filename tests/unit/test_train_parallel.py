"""How a step is dealt out to ranks, what ``auto`` chooses, torchrun's command line, and which error is the cause."""

import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.preflight.base_facts import BaseFacts
from toolkit.preflight.gpu import GpuFacts
from toolkit.recipe.train import TrainSection
from toolkit.stages.__main__ import main
from toolkit.train.parallel import again
from toolkit.train.parallel.choose import bytes_whole, choose
from toolkit.train.parallel.launch import (
    Launch,
    cause,
    killed,
    leave_error,
    rank_environ,
    torchrun_arguments,
)
from toolkit.train.parallel.share import share

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
H100 = GpuFacts("H100", 9.0, 80 * 2**30, count=8)


@given(count=st.integers(1, 40), ranks=st.integers(1, 9))
def test_every_micro_batch_is_computed_once_and_all_ranks_take_equally_many_turns(count, ranks):
    batches = [[[number]] for number in range(count)]
    turns = [share(batches, rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in turns}) == 1
    dealt = [turn.sequences for mine in turns for turn in mine if not turn.idle]
    assert sorted(dealt) == batches


def test_an_idle_rank_computes_one_real_row_along():
    batches = [[[7, 8], [9]], [[1]], [[2]]]
    first, second = share(batches, 0, 2), share(batches, 1, 2)
    assert [turn.idle for turn in first] == [False, False]
    assert [turn.idle for turn in second] == [False, True]
    assert second[1].sequences == [[7]]


def test_one_rank_has_all():
    batches = [[[1]], [[2]]]
    assert [turn.sequences for turn in share(batches, 0, 1)] == batches


def test_the_start_of_a_job_is_not_a_start_of_its_ranks():
    """Job engines name each start of a job in TOOLKIT_START, in words of their own."""
    assert again.starts({"TOOLKIT_START": "17.0"}) == 0
    assert again.starts({"TOOLKIT_START": "17.0", again.STARTS: "2"}) == 2


def chosen(config=LLAMA_8B, ranks=2, gpu=H100, **train):
    choice = choose(TrainSection(**train), ranks, BaseFacts(config) if config else None, gpu)
    return (choice.parallel, choice.reason) if choice else None


def test_auto_holds_the_model_on_each_gpu_where_it_fits():
    assert chosen() == (
        "ddp", "15.6 GiB of weights and their state fit into 60% of 80 GiB of each GPU",
    )  # fmt: skip


def test_auto_shares_weights_out_where_they_do_not_fit():
    engine, reason = chosen(method="full", ranks=8)
    assert engine == "fsdp"
    assert reason == (
        "119.7 GiB of weights and their state are more than 60% of 80 GiB: each GPU holds 1/8 of them"
    )
    assert chosen(LLAMA_70B)[0] == "fsdp"
    assert chosen(LLAMA_70B, method="qlora")[0] == "ddp"


def test_auto_has_nothing_to_choose_on_one_gpu_or_when_the_recipe_says():
    assert chosen(ranks=1) is None
    assert chosen(parallel="zero2") is None


@pytest.mark.parametrize(
    ("given", "engine", "said"),
    [
        ({"gpu": None}, "ddp", "on a CPU"),
        ({"config": None}, "ddp", "an adapter is small"),
        ({"config": None, "method": "full"}, "fsdp", "not known yet"),
        ({"method": "full", "optimizer": "adamw_8bit"}, "ddp", "kept|keeps its state in blocks"),
    ],
)
def test_auto_says_why_when_it_knows_little(given, engine, said):
    found, reason = chosen(**given)
    assert found == engine
    assert any(part in reason for part in said.split("|"))


def test_bytes_of_an_8b_are_those_of_its_parts():
    base, gib = BaseFacts(LLAMA_8B), 2**30
    parameters = 8_030_261_248
    assert base.parameters == parameters
    assert bytes_whole(TrainSection(method="full"), base) == 16 * parameters
    adapter = 41_943_040  # rank 16 on all linear layers
    assert bytes_whole(TrainSection(), base) == 2 * parameters + 16 * adapter
    assert 5.5 < bytes_whole(TrainSection(method="qlora"), base) / gib < 7.5


def test_torchrun_on_one_machine_meets_on_a_port_of_its_own():
    assert torchrun_arguments(Launch(2), 0, "abc", 0) == [
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--monitor-interval=0.5",
    ]


@pytest.mark.parametrize("node", [0, 1])
def test_torchrun_on_several_machines_meets_at_the_first(node):
    launch = Launch(8, 2, "head:29400")
    assert torchrun_arguments(launch, node, "abc", 1) == [
        "--nnodes=2",
        f"--node-rank={node}",
        "--rdzv-id=abc",
        "--master-addr=head",
        "--master-port=29401",
        "--nproc-per-node=8",
        "--max-restarts=0",
        "--monitor-interval=0.5",
    ]
    assert launch.ranks == 16


def test_ranks_share_the_cores_and_stay_on_loopback_unless_the_user_says():
    environ = rank_environ(Launch(2), {"TOOLKIT_EVENTS_FD": "5"}, cores=8)
    assert environ["OMP_NUM_THREADS"] == "4"
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert environ["TOOLKIT_EVENTS_PATH"].endswith("/fd/5")
    assert (
        rank_environ(Launch(2), {"GLOO_SOCKET_IFNAME": "eth1"}, 8)["GLOO_SOCKET_IFNAME"] == "eth1"
    )
    assert "GLOO_SOCKET_IFNAME" not in rank_environ(Launch(2, 2, "head:1"), {}, 8)


def error(time: float, message: str = "lost connection") -> dict:
    return {
        "time": time,
        "type": "StepFailedError",
        "message": message,
        "hint": "h",
        "exit_code": 1,
    }


def test_the_first_error_is_the_cause_and_names_its_rank():
    found = cause({0: error(2.0), 1: error(1.0, "CUDA out of memory")}, {0: 1, 1: 1}, 2)
    assert found["message"] == "rank 1 of 2: CUDA out of memory"
    assert (found["hint"], found["exit_code"]) == ("h", 1)


def test_an_error_of_all_ranks_is_nobody_s():
    same = {rank: error(rank, "train.lora.targets names 'up_pro'") for rank in (0, 1)}
    assert cause(same, {0: 1, 1: 1}, 2)["message"] == "train.lora.targets names 'up_pro'"


def test_a_rank_that_was_killed_is_the_cause_though_it_said_nothing():
    found = cause({0: error(1.0)}, {0: 1, 1: -signal.SIGKILL}, 2)
    assert found["message"] == (
        "rank 1 of 2 was ended by SIGKILL (SIGKILL that nobody sent is the kernel out of memory)"
    )
    assert "log.txt" in found["hint"]


def test_a_rank_that_was_killed_on_another_node_is_the_cause():
    lost = error(1.0, "Connection closed by peer")
    there = killed({0: lost}, {1: -signal.SIGKILL})
    assert there == {1: signal.SIGKILL}
    said = {0: lost, 1: {"time": 1.5, "signal": there[1]}}
    assert cause(said, {0: 1}, 2)["message"].startswith("rank 1 of 2 was ended by SIGKILL")
    assert killed(said, {0: 1}) == there


def test_a_rank_that_torchrun_ended_is_not_the_cause():
    assert cause({0: error(1.0, "x")}, {0: 1, 1: -signal.SIGTERM}, 2)["message"] == "rank 0 of 2: x"


def test_ranks_that_say_nothing_are_named_with_their_codes():
    assert "rank 0 with 3, rank 1 with 1" in cause({}, {1: 1, 0: 3}, 2)["message"]


def test_a_failed_rank_waits_for_the_errors_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.train.parallel.launch.LINGER_S", 0.1)
    leave_error(tmp_path, 1, 2, {"message": "b"})
    leave_error(tmp_path, 0, 2, {"message": "a"})  # returns at once: both are there
    assert json.loads((tmp_path / "rank-0.json").read_text())["message"] == "a"


def test_a_rank_that_fails_leaves_its_own_error_file(tmp_path, monkeypatch):
    step = {
        "stage": "train", "config": {}, "state": str(tmp_path), "launch": {"processes": 2}, "fingerprint": "f",
    }  # fmt: skip
    (tmp_path / "step.json").write_text(json.dumps(step))
    monkeypatch.setenv("TOOLKIT_LAUNCHER", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("toolkit.train.parallel.launch.LINGER_S", 0.0)
    assert main(str(tmp_path / "step.json")) == 1
    assert "validation error" in json.loads((tmp_path / "rank-1.json").read_text())["message"]
    assert not (tmp_path / "error.json").exists()
