import json

from toolkit.models.folder import copy_companions
from toolkit.train.curves import smoothed
from toolkit.train.folder import base_id


def model_folder(path, name):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_name_or_path": name} if name else {}))
    return path


def test_base_is_named_by_its_source_and_never_by_a_path(tmp_path):
    folder = model_folder(tmp_path / "a", "org/from-config")
    assert base_id(folder, {"source": "org/from-recipe"}) == "org/from-recipe"
    assert base_id(folder, {"source": "./models/x"}) == "org/from-config"
    assert base_id(folder, {}) == "org/from-config"


def test_base_that_is_only_a_path_has_a_neutral_name(tmp_path):
    folder = model_folder(tmp_path / "a", str(tmp_path / "somewhere"))
    assert base_id(folder, {"source": "~/models/x"}) == "base"
    assert base_id(model_folder(tmp_path / "b", None), {}) == "base"


def test_companions_are_copied_byte_for_byte_and_weights_are_not(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    template = "{% for m in messages %}\r\n  {{ m.content }}é"
    (source / "chat_template.jinja").write_bytes(template.encode())
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("weights")
    assert copy_companions(source, target) == ["chat_template.jinja", "tokenizer.json"]
    assert (target / "chat_template.jinja").read_bytes() == template.encode()
    assert not (target / "model.safetensors").exists()


def test_smoothing_is_a_running_mean():
    assert smoothed([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]
