#!/usr/bin/env bash
# What `make test` runs: first the tests that may share the machine, in a process of pytest for each core (up to
# four: each holds PyTorch); then those marked `serial`, one after the other, which wait for more than they
# compute, and beside them, on what they leave of the machine, those marked `computing`. What these say comes
# after what the serial ones say.
# usage: run.sh PYTHON [PYTEST_ARGUMENT...]
set -uo pipefail

python=${1:?usage: run.sh PYTHON [PYTEST_ARGUMENT...]}
shift
several=(--numprocesses auto --maxprocesses 4 --dist loadfile)

shared=0
"$python" -m pytest "${several[@]}" -m "not serial and not computing" "$@" || shared=$?
((shared == 2)) && exit 2 # interrupted

computing_log=$(mktemp)
computing_pid=
finish() {
  if [[ $computing_pid ]]; then
    kill -INT "$computing_pid" 2>/dev/null
    wait "$computing_pid"
  fi
  rm -f "$computing_log"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# The scheduler's class for what runs when nothing else wants to: a serial test's processes do not wait for it.
# With a process group of its own, so that it hears this script's SIGINT, and no other, exactly once.
idle=()
chrt --idle 0 true 2>/dev/null && idle=(chrt --idle 0)
set -m
"${idle[@]}" "$python" -m pytest "${several[@]}" -m computing "$@" >"$computing_log" 2>&1 &
computing_pid=$!
set +m

serial=0
"$python" -m pytest -m serial "$@" || serial=$?
((serial == 2)) && exit 2
computing=0
wait "$computing_pid" || computing=$?
computing_pid=
cat "$computing_log"

# 5: pytest had nothing to run, as where somebody asks for one file.
failed=0
ran=
for status in "$shared" "$serial" "$computing"; do
  ((status == 5)) || ran=1
  ((status == 0 || status == 5)) || failed=1
done
[[ $ran ]] || exit 5
exit "$failed"
