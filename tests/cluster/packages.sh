#!/usr/bin/env bash
# Install the Debian packages that the cluster needs and that are missing. Needs root only then.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

missing=()
want() { [[ -x $1 ]] || missing+=("$2"); } # want PROGRAM PACKAGE
want /usr/bin/openssl openssl
if [[ $PARTS == all ]]; then
  want /usr/sbin/runc runc
  want /usr/lib/cni/bridge containernetworking-plugins
  want /usr/bin/mmdebstrap mmdebstrap
  want /usr/bin/buildah buildah
  want /usr/sbin/nft nftables
  want /usr/sbin/iptables iptables
  want /usr/bin/ip iproute2
  want /usr/bin/python3 python3
fi
((${#missing[@]})) || exit 0

command -v apt-get >/dev/null || die "this is not Debian: install by other means: ${missing[*]}"
[[ $(id -u) == 0 ]] || die "run as root, or first: apt-get install ${missing[*]}"
say "installing Debian packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  die "apt-get could not install: ${missing[*]}"
}
