"""The example of `docs/how-to/secure-serving.md` does what the page says."""

import asyncio
import re
from pathlib import Path

from toolkit.gateway import keys, refusals
from toolkit.gateway.jwt import Tokens
from toolkit.recipe.front import JwtSection

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "secure-serving.md").read_text()


def test_the_token_of_the_page_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(example, {})
    section = JwtSection(issuer="https://id.example.com", audience="toolkit", jwks="jwks.json")
    tokens = Tokens(section)
    claims = asyncio.run(tokens.check((tmp_path / "token").read_text()))
    assert claims["sub"] == "alice"
    assert tokens.models(claims) == {"tickets"}


def test_the_expression_of_the_page_finds_keys():
    assert keys.SHAPE.pattern.replace("(", "").replace(")", "") in PAGE
    found = re.search(r"`(toolkit_\[\S+)`", PAGE)[1]
    assert re.fullmatch(found, keys.Keys().create("a")[1])


def test_the_codes_of_the_page_are_those_of_the_front():
    listed = dict(re.findall(r"^\| (\d{3}) \| `(\w+)`", PAGE, re.MULTILINE))
    made = [
        refusals.bad_key(""),
        refusals.too_fast("requests", "k", 1, 1, 1),
        refusals.overloaded(1),
        refusals.cannot_check(""),
        refusals.not_for_you("m"),
        refusals.no_metrics(),
    ]
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)`", PAGE, re.MULTILINE)
    assert listed
    for error in made:
        assert (str(error.status), error.code) in rows
