#!/bin/sh
# Native libraries that Python packages here load or build against: installed with apt where that is allowed, else named.
# Called by `make` before it makes the environment; silent and quick when nothing is missing.
set -eu

missing=""
need() { missing="$missing $1"; }
library() { ldconfig -p 2>/dev/null | grep -q "$1" || /sbin/ldconfig -p 2>/dev/null | grep -q "$1"; }

library 'libatomic\.so\.1' || need libatomic1        # memory fences of the topics
library 'libEGL\.so\.1' || need libegl1              # the virtual cell's cameras, without a display
library 'libOpenGL\.so\.0' || need libopengl0
ls /usr/share/glvnd/egl_vendor.d/*.json >/dev/null 2>&1 || need libegl-mesa0
ls /usr/lib/*/dri/*_dri.so >/dev/null 2>&1 || need libgl1-mesa-dri
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv

[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
  echo "missing native packages:$missing (names as in Debian); install them, then run make again" >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root="sudo"
else
  echo "missing native packages: run 'sudo apt-get install$missing', then make again" >&2
  exit 1
fi
echo "installing native packages:$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # the list is meant to be split
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
