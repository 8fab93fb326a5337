"""Profiles: the shipped ones load, mistakes have a line."""

import pytest

from toolkit import resources
from toolkit.errors import RecipeError, UsageError
from toolkit.launch import profiles


def write(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


def problem(tmp_path, text):
    with pytest.raises(RecipeError) as caught:
        profiles.load(write(tmp_path, text))
    return caught.value.message.replace(str(tmp_path), "")


@pytest.mark.parametrize("name", profiles.profile_names())
def test_shipped_profiles_load_and_are_named_as_their_files(name):
    assert profiles.load(name).name == name


def test_there_are_the_profiles_that_the_documentation_names():
    assert {"local", "local-cpu", "gpu-host"} <= set(profiles.profile_names())


def test_local_is_meant_when_none_is_named():
    profile = profiles.load()
    assert (profile.name, profile.backend, profile.accelerator) == ("local", "local", "auto")
    assert profile.folder == resources.profiles()


def test_relative_paths_start_at_the_profile(tmp_path):
    (tmp_path / "env").mkdir()
    path = write(tmp_path, "name: a\nenvironments: {train: {python: env/bin/python}}\n")
    from toolkit.environments import resolve

    assert resolve("train", profile=profiles.load(path)).python == tmp_path / "env/bin/python"


def test_an_unknown_key_has_its_line_and_the_likely_one(tmp_path):
    text = "name: a\naccelerater: cpu\n"
    assert problem(tmp_path, text) == (
        "/p.yaml:2: accelerater: is not a key here (did you mean 'accelerator'?)"
    )


def test_a_deep_mistake_has_its_line(tmp_path):
    text = "name: a\nenvironments:\n  vllm:\n    python: x\n    pythonpth: [a]\n"
    assert problem(tmp_path, text) == (
        "/p.yaml:5: environments.vllm.pythonpth: is not a key here (did you mean 'pythonpath'?)"
    )


def test_all_mistakes_come_at_once(tmp_path):
    assert problem(tmp_path, "accelerator: tpu\nbackend: cloud\n").count("\n") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nenvironments: {train: {lock: x, python: y}}", "lock and python are both given"),
        ("name: a\nenvironments: {train: {pythonpath: [x]}}", "pythonpath needs python"),
        (
            "name: a\nenvironments: {trian: {python: x}}",
            "environments.trian: is not a key here (did you mean 'train'?)",
        ),
        ("name: a\nenvironments: {core: {python: x}}", "environments.core: is not a key here"),
        ("name: [", "is not YAML"),
        ("- a", "is not a mapping"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, text, message):
    assert message in problem(tmp_path, text)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        profiles.load("locale")
    assert caught.value.message == "no profile is named 'locale' (did you mean 'local'?)"
    assert "a file of your own needs its path" in caught.value.hint


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"there is no profile file \./gone\.yaml"):
        profiles.load("./gone.yaml")
