"""What all tests share."""

from hypothesis import settings

# No deadline: on a busy machine the same example takes ten times as long.
settings.register_profile("toolkit", max_examples=50, deadline=None)
settings.load_profile("toolkit")
