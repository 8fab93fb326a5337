"""Schemathesis: what the front's own OpenAPI document says is what the front does."""

import json

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from toolkit.gateway.openapi import document
from toolkit.recipe.front import FrontSection, JwtSection, LimitsSection

CHECKS = (
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)


@pytest.fixture
def schema(request):
    request.node._nodeid = request.node.nodeid  # what schemathesis 4.32 reads, pytest 9.2 lacks
    return schemathesis.openapi.from_dict(document(FrontSection()))


# Of a fixture: cases of a schema at hand are made while tests are collected, by each worker.
@schemathesis.pytest.from_fixture("schema").parametrize()
@hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_requests_are_answered_as_documented(front, case):
    name = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(name, str) and 1 <= len(name) <= 256:
        case.body["model"] = "tickets"  # a name that is served: the rest of the request counts
    response = case.call(base_url=front.url)
    case.validate_response(response, checks=CHECKS)
    assert response.headers["x-request-id"]


def test_document_is_served_and_names_each_path_and_no_other(front):
    served = json.loads(front.ask("GET", "/openapi.json")[2])
    assert served == json.loads(json.dumps(document(FrontSection())))
    assert set(served["paths"]) == {
        "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/healthz", "/readyz", "/metrics",
        "/toolkit/certificate", "/openapi.json", "/v1/models/{model}",
    }  # fmt: skip


def test_document_tells_this_servers_caps_and_whether_it_asks_for_keys():
    section = FrontSection(
        limits=LimitsSection(max_n=3, max_tokens=50),
        jwt=JwtSection(issuer="https://i", audience="a", jwks="https://i/keys"),
    )
    told = document(section)
    properties = told["components"]["schemas"]["ChatBody"]["properties"]
    assert properties["n"]["anyOf"][0]["maximum"] == 3
    assert properties["max_completion_tokens"]["anyOf"][0]["maximum"] == 50
    assert told["security"] == [{"bearer": []}]
    assert told["paths"]["/healthz"]["get"]["security"] == []


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json"])
def test_open_paths_say_nothing_of_what_is_served(front, path):
    assert b"tickets" not in front.ask("GET", path)[2]
