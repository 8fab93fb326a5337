"""Measure an OpenAI endpoint under concurrent load."""
