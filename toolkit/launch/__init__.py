"""Where steps run: profiles, and the backends that start jobs."""
