#!/usr/bin/env bash
# Build the cluster's programs from the Go module proxy, those that are missing.
# usage: build.sh [NAME...]     (default: what the parts in TIDEGATE_CLUSTER_PARTS need)
# The modules in programs/ pin versions and carry checksums. The first time takes a quarter of an hour.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

names=("$@")
if ((${#names[@]} == 0)); then
  names=(etcd kube-apiserver kubectl)
  [[ $PARTS == api ]] || names+=(kube-controller-manager kube-scheduler)
  [[ $PARTS != control ]] || names+=(kwok)
  [[ $PARTS != all ]] || names+=(kubelet kube-proxy containerd ctr containerd-shim-runc-v2
    pause coredns ray-operator helm)
fi

# Kubernetes and its clients tell their version to Helm and kubectl only if it is stamped in.
minor=${K8S_VERSION#v1.}
stamp=
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
  stamp+=" -X $p.gitVersion=$K8S_VERSION -X $p.gitMajor=1 -X $p.gitMinor=${minor%.*}"
  stamp+=" -X $p.gitTreeState=clean"
done

recipe() { # recipe NAME: sets module (a folder in programs/, or none), package, flags
  module='' flags=''
  case $1 in
  kube*) module=k8s package=k8s.io/kubernetes/cmd/$1 flags=$stamp ;;
  etcd | pause | coredns) module=$1 package=. ;;
  ray-operator) module=kuberay package=github.com/ray-project/kuberay/ray-operator ;;
  containerd | ctr | containerd-shim-runc-v2)
    package=github.com/containerd/containerd/v2/cmd/$1@$CONTAINERD_VERSION
    flags="-X github.com/containerd/containerd/v2/version.Version=$CONTAINERD_VERSION"
    ;;
  helm)
    package=helm.sh/helm/v4/cmd/helm@$HELM_VERSION
    flags="-X helm.sh/helm/v4/internal/version.version=$HELM_VERSION"
    ;;
  kwok) package=sigs.k8s.io/kwok/cmd/kwok@$KWOK_VERSION ;;
  *) die "no such program: $1" ;;
  esac
}

compile() { # compile NAME FILE
  if [[ $module ]]; then
    (cd "$HERE/programs/$module" &&
      GOFLAGS="-buildvcs=false -mod=readonly" nice go build -ldflags "-s -w $flags" -o "$2" "$package")
  else # a program whose own module is its main one: checked against the checksum database
    local folder
    folder=$(mktemp -d "$2.XXXXXX")
    GOFLAGS=-buildvcs=false GOBIN=$folder nice go install -ldflags "-s -w $flags" "$package"
    mv -f "$folder/$1" "$2"
    rmdir "$folder"
  fi
}

# A program lies in the cache under its own key, so that a new version of one builds only that one.
mkdir -p "$CACHE/programs" "$BIN"
for name in "${names[@]}"; do
  [[ ! -x $BIN/$name ]] || continue
  recipe "$name"
  key=$({
    [[ -z $module ]] || cat "$HERE/programs/$module"/*
    echo "$package $flags $(uname -m)"
  } | sha)
  made=$CACHE/programs/$name-$key
  if [[ ! -x $made ]]; then
    export PATH=$PATH:/usr/local/go/bin
    command -v go >/dev/null || die "Go 1.26 or newer is needed once, to build the cluster's programs: install it from \
https://go.dev/dl into /usr/local/go, or put it on the PATH"
    t0=$SECONDS
    say "building $name"
    rm -rf "$made".*
    compile "$name" "$made.new" 2> >(grep -v '^go: downloading ' >&2 || true)
    mv -f "$made.new" "$made"
    say "$name: $((SECONDS - t0))s, $(($(stat -c %s "$made") / 1000000)) MB"
  fi
  ln -f "$made" "$BIN/$name"
done

# KubeRay's manifests come from the same module as its operator.
if [[ -x $BIN/ray-operator && ! -d $BIN/kuberay-config ]]; then
  export PATH=$PATH:/usr/local/go/bin
  need go
  source=$(cd "$HERE/programs/kuberay" && go list -m -f '{{.Dir}}' github.com/ray-project/kuberay/ray-operator)
  rm -rf "$BIN/kuberay-config.new"
  cp -r "$source/config" "$BIN/kuberay-config.new"
  chmod -R u+w "$BIN/kuberay-config.new"
  mv "$BIN/kuberay-config.new" "$BIN/kuberay-config"
fi
