#!/usr/bin/env bash
# Installs what is missing of the programs that the demo ("demo"), the demo on a stock QEMU
# ("demo-qemu") or the tests ("test") need, with apt and only if it may. Says what is missing where
# it may not.
set -euo pipefail

declare -A package=(
  [qemu-system-x86_64]=qemu-system-x86
  [qemu-img]=qemu-utils
  [gcc]=gcc
  [ld]=binutils
  [zstd]=zstd
  [gdb]=gdb
  [readelf]=binutils
  [dpkg-deb]=dpkg
  [cpio]=cpio
  [libvirtd]=libvirt-daemon-system
  [virtlogd]=libvirt-daemon-system
  [virsh]=libvirt-clients
  [pkg-config]=pkg-config
  [strace]=strace
  [crash]=crash
  [qemu-nbd]=qemu-utils
  [swtpm]=swtpm
  [mkfs.xfs]=xfsprogs
  [mkfs.btrfs]=btrfs-progs
)
programs=(gcc ld)
wanted=${1:-demo}
[[ $wanted == demo ]] || programs+=(qemu-system-x86_64 qemu-img dpkg-deb)
[[ $wanted == test ]] && programs+=(zstd gdb readelf strace qemu-nbd crash libvirtd virtlogd virsh pkg-config swtpm mkfs.xfs mkfs.btrfs)

python=${PYTHON:-python3}
missing=()
for program in "${programs[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
# gcc without the C library's headers cannot build the native core.
[[ -e /usr/include/stdio.h ]] || missing+=(libc6-dev)
# libvirt-python is built against the library's headers.
[[ $wanted != test || -e /usr/include/libvirt/libvirt.h ]] || missing+=(libvirt-dev)
# UEFI firmware has no program.
[[ $wanted != test || -e /usr/share/OVMF/OVMF_VARS_4M.fd ]] || missing+=(ovmf)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import sysconfig, os, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  missing+=(python3-dev)

become=()
if [[ $EUID -ne 0 ]]; then
  command -v sudo >/dev/null && become=(sudo)
fi
may=false
if command -v apt-get >/dev/null && { [[ $EUID -eq 0 ]] || [[ ${#become[@]} -gt 0 ]]; }; then
  may=true
fi

# The Linux guest's kernel is fetched with apt's lists, so that needs them even if nothing is missing.
have_lists=false
[[ $wanted == demo ]] && have_lists=true
for list in /var/lib/apt/lists/*_Packages* /var/lib/apt/lists/*Packages.lz4; do
  [[ -e "$list" ]] && have_lists=true
done
if $may && { [[ ${#missing[@]} -gt 0 ]] || ! $have_lists; }; then
  "${become[@]}" apt-get update -q
fi
[[ ${#missing[@]} -eq 0 ]] && exit 0
if ! $may; then
  echo "missing packages: ${missing[*]}; install them with your package manager" >&2
  exit 1
fi
DEBIAN_FRONTEND=noninteractive "${become[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
