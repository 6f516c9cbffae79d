#!/usr/bin/env bash
# Stop the cluster and undo all that it did to the machine: processes, pods, mounts, network namespaces,
# the bridge, nftables tables, cgroups, sysctls. Removes its data and logs; keeps what CACHE holds.
# usage: down.sh [--keep-logs]     (--keep-logs: to $STATE-logs)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

keep=${1:-}
[[ -z $keep || $keep == --keep-logs ]] || die "usage: down.sh [--keep-logs]"
[[ -d $LIVE ]] || exit 0
[[ $PARTS != all || $(id -u) == 0 ]] || die "run as root"
begin=$SECONDS
mkdir -p "$RUN"

# Nothing may restart a pod while pods are being stopped.
for name in kubelet kcm scheduler proxy; do stop "$name" & done
wait

# ---- pods -------------------------------------------------------------------
ctr() { "$BIN/ctr" -a "$RUN/containerd.sock" -n k8s.io "$@" 2>/dev/null; }
bundles=$LIVE/containerd/state/io.containerd.runtime.v2.task/k8s.io
mapfile -t sockets < <(cat "$bundles"/*/bootstrap.json 2>/dev/null | grep -o 'unix://[^"]*' |
  sed 's|^unix://||' | sort -u)
shims=() # of this cluster: pid and start time, read from each task's own parent
if ! alive containerd && compgen -G "$bundles/*" >/dev/null; then
  say "containerd is gone but its pods are not: starting it to stop them"
  export PATH=$BIN:$PATH
  start containerd "$BIN/containerd" -c "$ETC/containerd.toml"
  wait_for 60 containerd "$BIN/ctr" -a "$RUN/containerd.sock" version
fi
if alive containerd; then
  mapfile -t tasks < <(ctr tasks ls | awk 'NR > 1 {print $1, $2}')
  for task in "${tasks[@]}"; do
    parent=$(sed -n 's/^PPid:\t//p' "/proc/${task#* }/status" 2>/dev/null || true)
    [[ -z $parent ]] || tr '\0' ' ' <"/proc/$parent/cmdline" 2>/dev/null |
      grep -qF -- "-address $RUN/containerd.sock" || parent=
    [[ -z $parent ]] || shims+=("$parent $(start_time "$parent")")
  done
  for task in "${tasks[@]}"; do ctr tasks kill --all --signal KILL "${task% *}" >/dev/null || true; done
  for task in "${tasks[@]}"; do ctr tasks rm --force "${task% *}" >/dev/null || true; done
  mapfile -t containers < <(ctr containers ls -q)
  for container in "${containers[@]}"; do ctr containers rm "$container" >/dev/null || true; done
fi
for name in containerd apiserver; do stop "$name" 20 & done
wait
stop etcd # last: the API server cannot end without it
for shim in "${shims[@]}"; do
  pid=${shim% *}
  for _ in $(seq 20); do
    [[ $(start_time "$pid") == "${shim#* }" ]] || break
    sleep 0.1
  done
  [[ $(start_time "$pid") != "${shim#* }" ]] || kill -9 "$pid" 2>/dev/null || true
done
for socket in "${sockets[@]}"; do rm -f "$socket"; done

# ---- mounts: volumes, root filesystems and network namespaces (with their veths)
mounts() { awk -v p="$LIVE/" 'index($5 "/", p) == 1 {print $5}' /proc/self/mountinfo | sort -ru; }
for _ in 1 2 3; do
  mapfile -t found < <(mounts)
  ((${#found[@]})) || break
  for mount in "${found[@]}"; do umount "$mount" 2>/dev/null || umount -l "$mount" 2>/dev/null || true; done
done
[[ -z $(mounts) ]] || die "mounts remain under $LIVE: $(mounts | tr '\n' ' ')"

if [[ $PARTS == all ]]; then
  # ---- network --------------------------------------------------------------
  if ip link show "$BRIDGE" >/dev/null 2>&1; then ip link del "$BRIDGE"; fi
  nft delete table ip "$NFT_TABLE" 2>/dev/null || true
  for family in ip ip6; do nft delete table "$family" kube-proxy 2>/dev/null || true; done
  # Kubelet marks each table with one empty chain, even with its own rules off.
  for tool in iptables ip6tables; do
    for table in mangle nat filter; do
      for chain in KUBE-IPTABLES-HINT KUBE-KUBELET-CANARY; do
        "$tool" -t "$table" -X "$chain" 2>/dev/null || true
      done
    done
  done
  for result in /var/lib/cni/results/"$NFT_TABLE"-*-eth0; do
    [[ -e $result ]] || continue
    id=${result##*/"$NFT_TABLE"-}
    rm -f "$result" "/var/lib/cni/results/cni-loopback-${id%-eth0}-lo"
  done

  # ---- the rest of the machine ----------------------------------------------
  for link in /var/log/containers/*.log; do
    if [[ -L $link && $(readlink "$link") == "$LOG/pods/"* ]]; then rm -f "$link"; fi
  done
  for cgroup in /sys/fs/cgroup/*/kubepods /sys/fs/cgroup/kubepods; do
    if [[ -d $cgroup ]]; then find "$cgroup" -depth -type d -exec rmdir {} \; 2>/dev/null || true; fi
  done
  if [[ -s $RUN/sysctl.before ]]; then
    while read -r name value; do
      echo "$value" >"/proc/sys/$name" || say "could not restore $name"
    done <"$RUN/sysctl.before"
  fi
  if [[ -s $RUN/folders.new ]]; then
    rm -f /var/lib/kubelet/device-plugins/kubelet.sock
    sort -r "$RUN/folders.new" | while read -r folder; do
      rmdir "$folder" 2>/dev/null || true
    done
  fi
fi

if [[ $keep ]]; then
  rm -rf "$STATE-logs"
  mv "$LOG" "$STATE-logs"
  say "logs: $STATE-logs"
fi
rm -rf --one-file-system "$LIVE"
rm -f "$KUBECONFIG_FILE" "$FACTS_FILE"
rmdir "$STATE"
say "down after $((SECONDS - begin))s"
