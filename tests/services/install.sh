#!/usr/bin/env bash
# Install what the `services` tests start: Debian packages, as root, once; Grafana's own components
# by npm and their bundle, once per change of tests/services/grafana.
set -euo pipefail
need=(
  prometheus radosgw ceph-mon ceph-osd ceph-common iproute2 slurm-wlm curl chromium fonts-dejavu-core zsh
)
command -v node >/dev/null && command -v npm >/dev/null || need+=(nodejs npm)
missing=()
for package in "${need[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "make test-services installs ${missing[*]}: run it as root on Debian" >&2; exit 2; }
  echo "Installing ${missing[*]} ..."
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

cd "$(dirname "$0")/grafana"
if ! cmp -s package-lock.json node_modules/.installed; then
  echo "Installing Grafana's components ..."
  npm ci --ignore-scripts
  cp package-lock.json node_modules/.installed
fi
if [ -z "$(find build/boards.js -newer node_modules/.installed 2>/dev/null)" ] ||
  [ -n "$(find src package.json -newer build/boards.js)" ]; then
  npm run --silent build
fi
