#!/usr/bin/env bash
# Build the images `gateway` and `operator` from platform/images/Dockerfile with Debian's buildah, on a Debian
# base made here: no image registry is asked. Prints the buildah command that has them in its storage.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

need mmdebstrap buildah
mkdir -p "$IMAGES"
storage=$CACHE/buildah
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=overlay

codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
sources=/etc/apt/sources.list.d/debian.sources
[[ -e $sources ]] || sources=/etc/apt/sources.list
packages=python3,python3-venv,ca-certificates
base=build-base-$codename-$(echo "$packages $(uname -m)" | sha)

# build.sh calls a builder by its name: this one keeps everything in the cache.
builder=$storage/bin/buildah
mkdir -p "${builder%/*}"
put "$builder" <<END
#!/bin/sh
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=overlay
exec /usr/bin/buildah --root $storage/storage --runroot $storage/run "\$@"
END
chmod +x "$builder"

# Layers of past sources pile up, and buildah cannot tell those from the ones that save the next build.
if [[ -d $storage/storage && $(du -sm "$storage/storage" | cut -f1) -gt 4000 ]]; then
  "$builder" rmi --all --force >/dev/null
fi

if ! "$builder" inspect --type image "localhost/$base" >/dev/null 2>&1; then
  say "making the base to build on"
  nice mmdebstrap --quiet --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    "$codename" "$IMAGES/$base.tar" "$sources" >&2
  container=$("$builder" from scratch)
  "$builder" add -q "$container" "$IMAGES/$base.tar" / >/dev/null
  "$builder" commit -q "$container" "localhost/$base" >/dev/null
  "$builder" rm "$container" >/dev/null
  rm "$IMAGES/$base.tar"
fi

# The machine's certificates, because a proxy on the way to the package index may have one of its own.
options="--layers --network=host --volume=/etc/ssl/certs:/etc/ssl/certs:ro"
BASE=localhost/$base BUILDER=$builder REGISTRY=localhost/tidegate-test \
  BUILD_OPTIONS="$options --env=SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt" \
  nice "$CHECKOUT/platform/images/build.sh" gateway operator >&2
echo "$builder"
