"""Scoring a model on held-out rows: prompts, generation, metrics, intervals, reports."""
