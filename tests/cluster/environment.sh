#!/usr/bin/env bash
# Make the Python environments that containers see at /opt/tidegate: `light` for the gateway and the
# operator, `ray` for replicas. They hold what pyproject.toml asks for; Tidegate's own source comes from
# source.sh, so a changed source changes neither. Prints one line each: NAME FOLDER.
# usage: environment.sh [--print | --check]     (makes nothing; --check: ends with an error where it could not)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

# Only what decides which packages are installed: a new lint rule makes no new environment.
asked=$("$PYTHON" - "$CHECKOUT/pyproject.toml" <<'END'
import json, sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(json.dumps({key: project.get(key) for key in ("version", "dependencies", "optional-dependencies", "scripts")}))
END
)

uv=$(command -v uv || echo "$CHECKOUT/.venv/bin/uv")
need_uv() { [[ -x $uv ]] || die "uv is missing: \`make env\` installs it into .venv"; }

make_environment() { # make_environment FOLDER EXTRAS
  local t0=$SECONDS new=$1.new
  need_uv
  say "making the environment with tidegate[$2]; the first time this fetches packages"
  rm -rf "$new"
  # Relocatable, because the path in the container is another one.
  "$uv" venv --quiet --relocatable --python "$PYTHON" "$new"
  nice "$uv" pip install --quiet --compile-bytecode --python "$new/bin/python" \
    -c "$CHECKOUT/constraints.txt" -e "$CHECKOUT[$2]"
  # In a container the package is where source.sh's copy is mounted, not in this checkout.
  local packages
  packages=$(echo "$new"/lib/python3*/site-packages)
  rm -f "$packages"/*tidegate*.pth
  printf '/opt/tidegate/source/current/%s\n' platform operators >"$packages/tidegate.pth"
  mv "$new" "$1"
  say "$(basename "$1"): $((SECONDS - t0))s"
}

mkdir -p "$ENVIRONMENTS"
for environment in light:operator ray:local; do
  name=${environment%:*} extras=${environment#*:}
  key=$({ echo "$asked $extras" && cat "$CHECKOUT/constraints.txt" && "$PYTHON" -VV && uname -m; } | sha)
  folder=$ENVIRONMENTS/$name-$key
  if [[ ! -d $folder ]]; then
    case ${1:-} in
    --print) ;;
    --check) need_uv ;;
    *) make_environment "$folder" "$extras" ;;
    esac
  fi
  echo "$name $folder"
done
