#!/usr/bin/env bash
# What `make test-cluster-full` runs: first what needs a control plane alone, on a machine that does nothing
# else, then what needs a whole cluster. Leaves nothing behind, whatever happens.
# usage: full/run.sh PYTHON [PYTEST_ARGUMENT...]
# TIDEGATE_CLUSTER_KEEP=1 uses a whole cluster that runs already, and leaves it running.
set -euo pipefail
# shellcheck source=../lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"

python=${1:?usage: full/run.sh PYTHON [PYTEST_ARGUMENT...]}
shift
keep=${TIDEGATE_CLUSTER_KEEP:-}
[[ $(id -u) == 0 ]] || die "run as root: the cluster has real pods, mounts and networks"

exec 9>"$STATE.lock"
flock --nonblock 9 || die "another run of these tests uses this machine's cluster"

finish() {
  local status=$? logs=()
  trap '' INT TERM HUP # a second Ctrl-C must not leave half a cluster
  if ((status)); then logs=(--keep-logs); fi
  # Its tests stop it themselves, unless pytest was killed.
  TIDEGATE_CLUSTER_PARTS=control "$HERE/down.sh" "${logs[@]}"
  if [[ $keep ]]; then
    say "left running: $HERE/down.sh stops it"
  else
    "$HERE/down.sh" "${logs[@]}"
  fi
  rm -f "$STATE.lock"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# run KIND [PYTEST_ARGUMENT...]: 5 is pytest's word for nothing to run, as where somebody asks for tests of
# one kind. As the lock is this script's alone, nothing that outlives it may hold it.
run() {
  local status=0
  "$python" -m pytest "$HERE/full" --cluster-tests="$1" "${@:2}" 9>&- || status=$?
  ((status == 5)) || return "$status"
}

# What a run that was killed has left.
TIDEGATE_CLUSTER_PARTS=control "$HERE/down.sh"
[[ $keep ]] || "$HERE/down.sh"

cd "$CHECKOUT"
beside=0
run beside "$@" || beside=$?
"$HERE/up.sh" 9>&-
whole=0
run whole "$@" || whole=$?
exit $((beside || whole))
