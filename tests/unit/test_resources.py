"""Files that ship are found in a checkout and in a wheel."""

import pytest

from toolkit import resources
from toolkit.errors import NotInstalledError


def test_a_wheel_s_files_come_first(monkeypatch, tmp_path):
    package = tmp_path / "toolkit"
    for folder in (package / "_data", tmp_path):
        (folder / "recipes" / "demo").mkdir(parents=True)
    monkeypatch.setattr(resources, "PACKAGE", package)
    assert resources.shipped("recipes") == package / "_data" / "recipes"


def test_a_checkout_has_them_beside_the_package(monkeypatch, tmp_path):
    (tmp_path / "jobs" / "profiles").mkdir(parents=True)
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "toolkit")
    assert resources.profiles() == tmp_path / "jobs" / "profiles"


def test_recipes_are_named_by_their_path(monkeypatch, tmp_path):
    recipe = tmp_path / "recipes" / "demo" / "small.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.touch()
    (recipe.parent / "make_rows.py").touch()
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "toolkit")
    assert resources.recipes() == {"demo/small": recipe}


def test_a_damaged_installation_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "toolkit")
    with pytest.raises(NotInstalledError) as caught:
        resources.recipes()
    assert "'recipes' are in neither" in caught.value.message
    assert "the installation is damaged" in caught.value.hint
