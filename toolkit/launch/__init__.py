"""Where steps run: profiles."""
