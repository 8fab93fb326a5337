"""One world for each engine and module: the contract's tests share it, as users share a cluster."""

import pytest

from tests.contract.engines import ENGINES


@pytest.fixture(scope="module", params=sorted(ENGINES))
def world(request, tmp_path_factory):
    """A workspace on an engine."""
    made = ENGINES[request.param](tmp_path_factory.mktemp(request.param), request)
    yield made
    made.close()


@pytest.fixture
def local(tmp_path, request):
    """A workspace of its own on this machine."""
    made = ENGINES["local"](tmp_path, request)
    yield made
    made.close()
