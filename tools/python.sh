# Sourced by the other scripts. Finds a Python that can make a virtual environment.

fail() {
    echo "pageferry: $*" >&2
    exit 1
}

is_debian() {
    command -v apt-get >/dev/null && [ -e /etc/debian_version ]
}

# Prints the first Python 3.11 or newer; PYTHON, when set, is the only candidate.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo 'not there')." \
        "Install one, or name it: make PYTHON=/path/to/python3 …"
}

# Debian splits ensurepip off into a package of its own, without which `python3 -m venv` stops half-way.
ensure_venv_module() {
    local python=$1 package
    "$python" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if ! is_debian; then
        fail "$python has no ensurepip; install the package of your system that brings it."
    fi
    if [ "$(id -u)" -ne 0 ]; then
        fail "$python cannot make virtual environments: install $package (as root: apt-get install $package)."
    fi
    echo "installing $package"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package" >/dev/null ||
        fail "apt-get could not install $package."
}
