"""Imported by Ray in each of its workers, ahead of need (`RAY_preload_python_modules`): see `spare`."""

from tidegate.serving import spare

spare.become()
