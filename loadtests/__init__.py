"""Load tests of Tidegate: `python -m loadtests.run --help`, figures in README.md.

No timed test: every scenario prints figures and ratios of one run; nothing here fails because a machine
is slow.
"""
