"""What all tests share, in every environment: nothing here may import more than the standard library."""

import signal

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
