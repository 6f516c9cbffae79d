#!/usr/bin/env bash
# Start the cluster, run the tests in it, and leave nothing behind, whatever happens: what `make
# test-cluster` runs. usage: run.sh PYTHON [PYTEST_ARGUMENT...]
# TIDEGATE_CLUSTER_KEEP=1 goes on with a cluster that runs already, and leaves it running.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

python=${1:?usage: run.sh PYTHON [PYTEST_ARGUMENT...]}
shift
keep=${TIDEGATE_CLUSTER_KEEP:-}

exec 9>"$STATE.lock"
flock --nonblock 9 || die "another run of these tests uses this machine's cluster"

finish() {
  local status=$?
  trap '' INT TERM HUP # a second Ctrl-C must not leave half a cluster
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
# The cluster's processes outlive this script; they must not hold its lock.
"$HERE/up.sh" 9>&-
cd "$CHECKOUT"
"$python" -m pytest tests/cluster "$@" 9>&-
