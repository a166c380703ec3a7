"""Serving a language model: what vLLM does, each idea in one file."""
