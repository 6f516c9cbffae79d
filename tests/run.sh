#!/usr/bin/env bash
# What `make test` runs: first the tests that may share the machine, in a process of pytest for each core (up to
# four: each holds PyTorch), then those marked `serial`, one after the other.
# usage: run.sh PYTHON [PYTEST_ARGUMENT...]
set -uo pipefail

python=${1:?usage: run.sh PYTHON [PYTEST_ARGUMENT...]}
shift

shared=0
"$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not serial" "$@" || shared=$?
((shared == 2)) && exit 2 # interrupted
serial=0
"$python" -m pytest -m serial "$@" || serial=$?

# 5: pytest had nothing to run, as where somebody asks for one file.
((shared == 5)) && exit "$serial"
((serial == 5)) && exit "$shared"
exit $((shared || serial))
