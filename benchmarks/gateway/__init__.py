"""What the front costs, measured against a fake engine that does nothing but send: ``python -m benchmarks.gateway``."""
