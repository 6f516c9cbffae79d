"""Tidegate: many language models behind one OpenAI-compatible address, from a queue that loses nothing."""

__version__ = "0.1.0"
