#!/usr/bin/env bash
# Install the real servers that the `services` tests start: Debian packages, as root, once.
set -euo pipefail
need=(prometheus radosgw ceph-mon ceph-osd ceph-common iproute2 slurm-wlm curl)
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
