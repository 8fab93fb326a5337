"""Where the time of a training step goes: single products, kernels by tile, whole steps."""
