"""What all tests share, in every environment: nothing here may import more than the standard library."""

import signal

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    # the fast ones: each starts engines or servers, and waits for their ends
    "test_engine_server.py",
    "test_guard.py",
    "test_serve_stage.py",
    "test_tracking_run.py",
    "test_front_keeps_its_openapi.py",
    "test_front_keeps_traffic_whole.py",
    "test_live_adapters.py",
    "test_bench.py",
    "test_gateway_limits.py",
    # of minutes
    "test_recipe_to_served.py",
    "test_contract.py",
    "test_chaos.py",
    "test_chaos_with_vllm.py",
    "test_proofs_with_vllm.py",
    "test_preflight_agrees_with_vllm.py",
    # of the train environment
    "test_ranks.py",
    "test_out_of_memory_on_ranks.py",
    "test_objectives_on_ranks.py",
    "test_objectives.py",
    "test_fetch_gguf.py",
    "test_training_benchmark.py",
    "test_launch.py",
)
"""A process of pytest takes a whole file: these go first, so that none of them is left alone at the end."""


def pytest_collection_modifyitems(items):
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
