#!/usr/bin/env bash
# Copy the checkout's Python source to where containers see it. On a running cluster, processes that
# start afterwards run the new source: `kubectl rollout restart`, or delete the pod.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

# A container sees the folder `source`; a new copy appears in it whole, by moving one link.
folder=$LIVE/source
copy=$folder/$(date +%s%N)
mkdir -p "$copy"
for part in platform operators; do
  [[ ! -d $CHECKOUT/$part ]] || cp -r "$CHECKOUT/$part" "$copy/$part"
done
find "$copy" -name __pycache__ -prune -exec rm -r {} +
chmod -R u=rwX,go=rX "$folder"
# Containers mount it read-only: byte code that is not here would be compiled anew by every process.
"$PYTHON" -m compileall -q -s "$copy" -p /opt/tidegate/source/current "$copy"
ln -sfn "$(basename "$copy")" "$folder/next"
mv -T "$folder/next" "$folder/current"
# Processes may still import from the copy before this one.
find "$folder" -mindepth 1 -maxdepth 1 -type d -mmin +30 ! -path "$copy" -exec rm -rf {} +
