#!/usr/bin/env bash
# Start the cluster, run the tests in it, and leave nothing behind, whatever happens: what `make
# test-cluster` runs. usage: run.sh PYTHON [PYTEST_ARGUMENT...]
# The tests that need no more than an API server or a builder of their own run beside the others, in a second
# pytest; what that one says comes after what the first one says.
# TIDEGATE_CLUSTER_KEEP=1 goes on with a cluster that runs already, and leaves it running.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

python=${1:?usage: run.sh PYTHON [PYTEST_ARGUMENT...]}
shift
keep=${TIDEGATE_CLUSTER_KEEP:-}
tests=("$python" -m pytest tests/cluster)
beside_log=$STATE-beside.log
beside_pid=

exec 9>"$STATE.lock"
flock --nonblock 9 || die "another run of these tests uses this machine's cluster"

finish() {
  local status=$?
  trap '' INT TERM HUP # a second Ctrl-C must not leave half a cluster
  if [[ $beside_pid ]]; then
    kill -INT "$beside_pid" 2>/dev/null || true # pytest then stops what its fixtures started
    wait "$beside_pid" || true
    cat "$beside_log"
  fi
  rm -f "$beside_log"
  if [[ $keep ]]; then
    say "left running: $HERE/down.sh stops it"
  elif ((status)); then
    "$HERE/down.sh" --keep-logs
  else
    "$HERE/down.sh"
  fi
  rm -f "$STATE.lock"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# What a run that was killed has left.
[[ $keep ]] || "$HERE/down.sh"
# Made before two want to make it.
"$HERE/packages.sh"
"$HERE/environment.sh" --check >/dev/null
"$HERE/build.sh"

cd "$CHECKOUT"
# With a process group of its own, so that it hears this script's SIGINT, and no other, exactly once. Nothing
# that outlives this script may hold its lock.
set -m
"${tests[@]}" --cluster-tests=beside "$@" >"$beside_log" 2>&1 9>&- &
beside_pid=$!
set +m
"$HERE/up.sh" 9>&-
whole=0
"${tests[@]}" --cluster-tests=whole "$@" 9>&- || whole=$?
beside=0
wait "$beside_pid" || beside=$?
beside_pid=
echo
echo "==== beside it ===="
cat "$beside_log"

# 5: pytest had nothing to run, as where somebody asks for tests of one kind.
((whole == 5)) && exit "$beside"
((beside == 5)) && exit "$whole"
exit $((whole || beside))
