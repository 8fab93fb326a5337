"""Supervised fine-tuning: a step loop of our own, with batches, loss and checkpoints beside it."""
