"""Who is measured: each module has ``measure(case, batch, folder, clock)`` and takes ``clock.total`` steps."""
