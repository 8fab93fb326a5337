"""What uv is told about this machine."""

from toolkit.environments.uv import torch_source, uv_environ


def test_pip_s_settings_reach_uv():
    env = uv_environ(
        {"PIP_INDEX_URL": "https://a/simple", "PIP_FIND_LINKS": "/x /y", "PIP_CERT": "/c"}
    )
    assert env["UV_DEFAULT_INDEX"] == "https://a/simple"
    assert env["UV_FIND_LINKS"] == "/x,/y"
    assert env["SSL_CERT_FILE"] == "/c"


def test_uv_s_own_settings_win():
    given = {"PIP_INDEX_URL": "https://a", "PIP_FIND_LINKS": "/x"}
    env = uv_environ(given | {"UV_INDEX_URL": "https://b", "UV_FIND_LINKS": "/y"})
    assert "UV_DEFAULT_INDEX" not in env
    assert env["UV_FIND_LINKS"] == "/y"


def test_an_active_environment_is_not_built_into():
    env = uv_environ({"VIRTUAL_ENV": "/v", "PYTHONPATH": "/p", "CONDA_PREFIX": "/c", "HOME": "/h"})
    assert env == {"HOME": "/h"}


def test_torch_comes_from_a_folder_that_has_it(tmp_path):
    assert torch_source({"PIP_FIND_LINKS": str(tmp_path)}) == ["--torch-backend", "cpu"]
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert torch_source({"PIP_FIND_LINKS": str(tmp_path)}) == []
    assert torch_source({"UV_FIND_LINKS": f"file://{tmp_path}"}) == []


def test_torch_comes_from_pytorch_s_index_otherwise():
    assert torch_source({}) == ["--torch-backend", "cpu"]


def test_a_remote_page_of_wheels_is_trusted_to_have_it():
    assert torch_source({"UV_FIND_LINKS": "https://wheels.example/torch.html"}) == []
