#!/usr/bin/env bash
# Unpack the QEMU of the distribution's backports into .make/qemu-newer for tests/bench/qemu.py; nothing is installed.
# As root on Debian. Where there is no newer QEMU to be had, that is said and the script ends well: the benchmark takes
# the installed one alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/python.sh

package=qemu-system-x86
program=qemu-system-x86_64
here=$PWD/.make/qemu-newer

skip() {
    echo "skipped: a newer QEMU beside the installed one ($*)"
    exit 0
}

# The place that the system itself takes the distribution's main packages from.
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(ORIGIN)' 'Created-By: Packages' |
        awk -v codename="$1" '$2 == codename && $3 == "Debian" && !found++ { print $1 }'
}

# apt, with lists, sources and downloads of its own; what is installed, keys and the way to the mirror are the system's.
private_apt() {
    local command=$1
    shift
    "$command" -o Dir::State="$scratch/state" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$scratch/cache" \
        -o Dir::Etc::sourcelist="$scratch/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o APT::Sandbox::User=root -o Debug::NoLocking=true "$@"
}

[ "$(id -u)" -eq 0 ] && is_debian || skip "only root on Debian can have apt unpack one"
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
uri=$(mirror "$codename")
[ -n "$uri" ] || skip "apt knows no mirror of ${codename:-this system}; run apt-get update first"

mkdir -p .make
scratch=$(mktemp -d .make/newer-qemu.XXXXXX)
scratch=$PWD/$scratch
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/state/lists/partial" "$scratch/cache/archives/partial" "$scratch/tree"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
option=
[ -r "$keyring" ] && option="[signed-by=$keyring]"
for suite in "$codename" "$codename-updates" "$codename-backports"; do
    echo "deb $option $uri $suite main"
done >"$scratch/sources.list"

private_apt apt-get -qq -o APT::Update::Error-Mode=any update || skip "the backports of $codename cannot be reached"
newest=$(private_apt apt-cache madison "$package" | awk -v suite="$codename-backports/main" 'index($0, suite) && !found++ { print $3 }')
[ -n "$newest" ] || skip "the backports of $codename have no $package"
installed=$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null || true)
dpkg --compare-versions "$newest" gt "${installed:-0}" || skip "$package $installed is as new as that of the backports"

# Everything that an installation would bring, and so each library that is missing here.
private_apt apt-get -qq -y --no-install-recommends --download-only -t "$codename-backports" install "$package" >/dev/null ||
    skip "$package $newest cannot be downloaded"
for archive in "$scratch"/cache/archives/*.deb; do
    dpkg-deb --extract "$archive" "$scratch/tree"
done

# QEMU finds its firmware and modules beside itself; its libraries it has to be told.
libraries=$(find "$scratch/tree" -name '*.so.*' -printf "$here/tree/%P\n" | sed 's|/[^/]*$||' | sort -u | paste -sd:)
cat >"$scratch/$program" <<END
#!/bin/sh
LD_LIBRARY_PATH='$libraries' exec '$here/tree/usr/bin/$program' "\$@"
END
chmod 755 "$scratch/$program"
rm -rf "$here"
mkdir "$here"
mv "$scratch/tree" "$scratch/$program" "$here/"
"$here/$program" --version | head -n 1
