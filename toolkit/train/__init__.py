"""Supervised fine-tuning with a step loop of our own: batches, loss, optimizer and checkpoints are small rooms."""
