#!/usr/bin/env bash
# Build the images; `make images` calls it.
# usage: build.sh [gateway] [operator] [ray] [ray-vllm]     (default: the first three)
#
#   REGISTRY       what the images are named under (localhost/tidegate)
#   BASE           image to build on (the Dockerfile's own)
#   BUILDER        buildah, podman or docker (the first that is installed)
#   BUILD_OPTIONS  further options of the builder, as in BUILD_OPTIONS=--network=host
#   PUSH           1: push them when they are built
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

registry=${REGISTRY:-localhost/tidegate}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
builder=${BUILDER:-}
for name in buildah podman docker; do
  [[ -z $builder ]] && command -v "$name" >/dev/null && builder=$name
done
if [[ -z $builder ]]; then
  echo "To build images, install buildah, podman or docker (Debian: apt install buildah)" >&2
  exit 1
fi
targets=("$@")
((${#targets[@]})) || targets=(gateway operator ray)

options=(--file platform/images/Dockerfile)
[[ -z ${BASE:-} ]] || options+=(--build-arg "BASE=$BASE")
read -r -a more <<<"${BUILD_OPTIONS:-}"
for target in "${targets[@]}"; do
  image=$registry/$target:$version
  echo "building $image with $builder"
  "$builder" build "${options[@]}" "${more[@]}" --target "$target" --tag "$image" .
  if [[ ${PUSH:-0} == 1 ]]; then "$builder" push "$image"; fi
done
