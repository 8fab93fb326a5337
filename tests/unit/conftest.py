"""What all tests share."""

from hypothesis import HealthCheck, settings

# No deadline: on a busy machine the same example takes ten times as long.
# The same holds for the making of examples.
settings.register_profile(
    "toolkit", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("toolkit")
