#!/usr/bin/env bash
# Bring the system's programs that tests use. As root on Debian or Ubuntu what is missing is installed; elsewhere each
# missing one is named with the tests that are skipped without it. Never fails: the suite runs with what there is.
set -uo pipefail
cd "$(dirname "$0")/.."
. tools/python.sh

PATH="$PWD/.make/bin:$PATH:/usr/sbin:/sbin"
# program, Debian package, what is skipped without it
wanted=(
    "promtool prometheus the unit tests of the alert rules"
    "ip iproute2 tests that cut a network in its own namespace"
    "systemd-analyze systemd the check of the systemd unit"
    "qemu-system-x86_64 qemu-system-x86 tests that move a QEMU guest"
    "gcc gcc tests that move a QEMU guest"
    "libc.a libc6-dev tests that move a QEMU guest"
    "busybox busybox-static tests that move a QEMU guest"
    "vmlinuz linux-image-cloud-amd64 tests that move a QEMU guest"
)

# A dynamic program names its loader near its beginning.
is_static() {
    [ -n "$1" ] && ! head -c 4096 "$1" | grep -aq /ld-linux
}

is_missing() {
    case $1 in
        libc.a) [[ $(gcc -print-file-name=libc.a 2>/dev/null) != */* ]] ;;
        vmlinuz) [ ! -r .make/guest/vmlinuz ] && ! compgen -G "/boot/vmlinuz-*cloud*" >/dev/null ;;
        busybox) [ ! -x .make/guest/busybox ] && ! is_static "$(command -v busybox)" ;;
        *) ! command -v "$1" >/dev/null ;;
    esac
}

# Where one file of a package is enough, the package is not installed: prometheus would start a server on the
# developer's machine, a kernel would become the one that it boots, and busybox-static would replace busybox.
# unpack PACKAGE FILE WHERE MODE; FILE ends in a pattern for find.
unpack() {
    local scratch file status
    scratch=$(mktemp -d) || return
    (cd "$scratch" && apt-get download -qq -o APT::Sandbox::User=root "$1" && dpkg-deb --extract ./*.deb tree) &&
        file=$(find "$scratch/tree" -type f -path "*/$2" -print -quit) &&
        install -D -m "$4" "$file" "$3"
    status=$?
    rm -rf "$scratch"
    return "$status"
}

# The newest kernel: linux-image-cloud-amd64 holds nothing itself and depends on the package that does.
unpack_kernel() {
    local package
    package=$(LC_ALL=C apt-cache depends "$1" | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p')
    unpack "${package:-$1}" "boot/vmlinuz-*" .make/guest/vmlinuz 644
}

bring() {
    echo "installing $1 from the package $2"
    case $1 in
        promtool) unpack "$2" bin/promtool .make/bin/promtool 755 ;;
        busybox) unpack "$2" bin/busybox .make/guest/busybox 755 ;;
        vmlinuz) unpack_kernel "$2" ;;
        *) DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$2" >/dev/null ;;
    esac
}

lists_are_fresh=
for line in "${wanted[@]}"; do
    read -r program package skipped <<<"$line"
    is_missing "$program" || continue
    if [ "$(id -u)" -eq 0 ] && is_debian; then
        if [ -z "$lists_are_fresh" ]; then
            apt-get update -qq || echo "apt-get update failed; trying with the lists that are here"
            lists_are_fresh=yes
        fi
        bring "$program" "$package" || echo "could not install $package"
        hash -r
    fi
    if is_missing "$program"; then
        echo "skipped: $skipped ($program is missing; it is in the package $package)"
    fi
done
exit 0
