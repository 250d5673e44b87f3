#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Builds tlbridge_uv.ko and gru.ko, the kernel's own sgi-gru driver on tlbridge's PCI function.
set -eu

usage() {
    cat <<EOF
usage: $0 --headers DIR --gru-source DIR --out DIR [--trace]

  --headers DIR     a prepared kernel build tree, such as /lib/modules/VERSION/build
  --gru-source DIR  that kernel's drivers/misc/sgi-gru, or its source tree
  --out DIR         where tlbridge_uv.ko and gru.ko go; DIR/build is rewritten
  --trace           compile the driver's trace messages in (/proc/sgi_uv/gru/debug_options bit 0)
EOF
}

fail() {
    echo "$0: $1" >&2
    exit 1
}

headers='' source='' out='' trace=''
while [ $# -gt 0 ]; do
    case $1 in
    --headers | --gru-source | --out)
        [ $# -ge 2 ] || fail "$1 wants a directory"
        case $1 in
        --headers) headers=$2 ;;
        --gru-source) source=$2 ;;
        --out) out=$2 ;;
        esac
        shift 2
        ;;
    --trace)
        trace=CFLAGS_MODULE=-DCONFIG_SGI_GRU_DEBUG
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
done
if [ -z "$headers" ] || [ -z "$source" ] || [ -z "$out" ]; then
    usage >&2
    exit 2
fi

for program in make gcc ld; do
    command -v "$program" >/dev/null || fail "$program is missing (Debian: apt-get install gcc make)"
done
if [ ! -e "$headers/Makefile" ] || [ ! -e "$headers/include/generated/autoconf.h" ]; then
    fail "$headers is no prepared kernel build tree (Debian: linux-headers-VERSION, then /lib/modules/VERSION/build)"
fi
if [ -e "$source/drivers/misc/sgi-gru/grumain.c" ]; then
    source=$source/drivers/misc/sgi-gru
fi
if [ ! -e "$source/grumain.c" ]; then
    fail "$source has no grumain.c: the driver is in drivers/misc/sgi-gru of the kernel's sources (Debian: linux-source-6.12; later kernels may have dropped it)"
fi

here=$(cd "$(dirname "$0")" && pwd)
headers=$(cd "$headers" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
build=$out/build

rm -rf "$build"
mkdir -p "$build/gru"
cp "$here/Kbuild" "$here"/*.c "$here"/*.h "$build/"
# The driver's own Makefile names its objects; Kbuild, ours, takes precedence and includes it.
cp "$source"/*.c "$source"/*.h "$source/Makefile" "$build/gru/"
for file in "$here"/gru/*; do
    [ ! -e "$source/$(basename "$file")" ] || fail "the driver has a $(basename "$file") of its own now"
    cp "$file" "$build/gru/"
done

# shellcheck disable=SC2086 # empty or one word
make -s -C "$headers" M="$build" -j"$(nproc)" $trace modules || {
    kernel=$(cat "$headers/include/config/kernel.release" 2>/dev/null || echo unknown)
    fail "no modules for Linux $kernel: the shim is for 6.12; with 6.1 it does not compile (no node_to_socket), and 7.3 has no sgi-gru driver"
}
cp "$build/tlbridge_uv.ko" "$build/gru/gru.ko" "$out/"
