"""Lock files: complete, hashed, free of this machine."""

import re

import pytest

from toolkit import resources
from toolkit.environments import from_lock, load_lock, lock, lock_names
from toolkit.environments.lockfile import directives
from toolkit.errors import UsageError

STAGE_LOCKS = [name for name in lock_names() if name not in ("core", "dev")]


def test_every_environment_has_its_locks():
    assert set(lock_names()) == {
        "core", "dev", "train-cpu", "train-cuda", "quantize-cpu", "quantize-cuda",
        "vllm-cpu", "vllm-cuda", "sglang-cuda", "router", "ray",
    }  # fmt: skip


@pytest.mark.parametrize("name", lock_names())
def test_every_pin_has_a_hash(name):
    text = load_lock(name).text
    requirements = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(requirements) > (20 if name == "router" else 50)
    assert [r for r in requirements if "==" not in r or "--hash=sha256:" not in r] == []


@pytest.mark.parametrize("name", lock_names())
def test_no_lock_names_an_index_or_a_path_of_the_machine_that_made_it(name):
    text = load_lock(name).text
    assert not re.search(r"--(extra-)?index-url|--find-links|^-[if] |https?://|file:|[ (]/", text)


@pytest.mark.parametrize("name", lock_names())
def test_a_lock_says_for_which_machine_it_was_made_as_its_source_does(name):
    wanted = directives((resources.locks() / f"{name}.in").read_text())
    made = directives(load_lock(name).text)
    assert made == {k: v for k, v in wanted.items() if k in ("python", "platform", "universal")}


@pytest.mark.parametrize("name", lock_names())
def test_a_lock_holds_the_versions_that_its_source_pins(name):
    folder = resources.locks()
    source = (folder / f"{name}.in").read_text()
    for included in re.findall(r"^-r (\S+)", source, re.MULTILINE):
        source += (folder / included).read_text()
    wanted = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", source, re.MULTILINE))
    pins = load_lock(name).pins
    assert {n: pins[n].partition("+")[0] for n in wanted} == wanted


@pytest.mark.parametrize("name", [name for name in STAGE_LOCKS if name.endswith("-cpu")])
def test_cpu_locks_have_the_cpu_build_of_torch_and_none_of_its_cuda_companions(name):
    pins = load_lock(name).pins
    assert pins["torch"].endswith("+cpu")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(pins)
    assert "nvidia-cuda-runtime" not in pins


@pytest.mark.parametrize("name", [name for name in STAGE_LOCKS if name.endswith("-cuda")])
def test_cuda_locks_have_no_local_build_of_torch(name):
    pins = load_lock(name).pins
    assert "+" not in pins["torch"]
    assert "nvidia-cuda-runtime" in pins


def test_tools_agree_with_the_core():
    core, dev = load_lock("core").pins, load_lock("dev").pins
    assert {n: v for n, v in dev.items() if n in core} == {n: core[n] for n in core if n in dev}
    assert core["mlflow"] == "3.17.2"
    assert "uv" in core


def test_only_the_core_has_mlflow():
    assert [n for n in STAGE_LOCKS if {"mlflow", "mlflow-skinny"} & set(load_lock(n).pins)] == []


def test_an_environment_s_folder_carries_the_digest_of_its_lock(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    made = from_lock("train-cpu")
    assert made.digest == load_lock("train-cpu").digest
    assert made.path == tmp_path / "environments" / f"train-cpu-{made.digest[:12]}"


def test_an_unknown_lock_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError) as caught:
        load_lock("train-gpu")
    assert caught.value.message.startswith("no lock is named 'train-gpu' (did you mean 'train-")
    assert "vllm-cuda" in caught.value.hint


def test_an_override_file_is_no_lock():
    with pytest.raises(UsageError, match="no lock is named 'override-cpu'"):
        load_lock("override-cpu")


def test_what_uv_is_asked_for():
    folder = "toolkit/environments/locks"
    common = ["--generate-hashes", "--no-header", "--quiet"]
    assert lock.arguments("vllm-cpu") == [
        f"{folder}/vllm-cpu.in", *common, "--python-version", "3.11",
        "--python-platform", "x86_64-manylinux_2_28", "--override", f"{folder}/override-cpu.txt",
    ]  # fmt: skip
    assert lock.arguments("dev") == [
        f"{folder}/dev.in", *common, "--universal", "--python-version", "3.11",
        "--constraint", f"{folder}/core.txt", "pyproject.toml", "--extra", "dev",
    ]  # fmt: skip
