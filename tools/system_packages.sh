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
)

is_missing() {
    ! command -v "$1" >/dev/null
}

# Installing the package prometheus would start a server on the developer's machine; only its one program is wanted.
unpack_promtool() {
    local scratch
    scratch=$(mktemp -d) || return
    (cd "$scratch" && apt-get download -qq -o APT::Sandbox::User=root prometheus && dpkg-deb --extract ./*.deb tree) &&
        install -D "$scratch/tree/usr/bin/promtool" .make/bin/promtool
    rm -rf "$scratch"
}

bring() {
    echo "installing $1 from the package $2"
    if [ "$1" = promtool ]; then
        unpack_promtool
    else
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$2" >/dev/null
    fi
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
