"""Releases of models in parts: split ones, and language models."""
