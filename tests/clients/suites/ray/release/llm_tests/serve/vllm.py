"""The name of vLLM that these tests use; which skips what certain versions of it hang at."""

__version__ = "0.33.0"
