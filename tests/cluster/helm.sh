#!/usr/bin/env bash
# Print where Helm is: TIDEGATE_HELM, the PATH, or else built here (with Go, a minute, once).
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

if [[ ${TIDEGATE_HELM:-} ]]; then
  echo "$TIDEGATE_HELM"
elif ! command -v helm; then
  "$HERE/build.sh" helm
  echo "$BIN/helm"
fi
