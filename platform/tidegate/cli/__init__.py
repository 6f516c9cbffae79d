"""The `tidegate` command. It talks to people on stderr; stdout carries only data.

Each module holds the commands of one subject and imports what it needs inside them, so that `--help` and
completion stay instant and nothing here drags in torch, transformers or ray.
"""
