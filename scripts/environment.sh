# shellcheck shell=bash disable=SC2034 # venv_options is read by those who source this
# What quickstart, test and test-in-container share: distribution packages, the Python to use, virtual environments.
# Sourced, never run. Nothing here needs the network when what it would fetch is there already.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Debian 12's; older ones lack calls that the daemon makes.
oldest_pyfuse3=3.2

if [ -d "$checkout/.wheels" ]; then # a build context made by test-in-container: no index is asked
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$checkout/.wheels
fi
# Without a home there is no cache, which pip would complain about each time.
if [ ! -w "${HOME:-/nonexistent}" ]; then export PIP_NO_CACHE_DIR=1; fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONNOUSERSITE=1

say() { printf '\n== %s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

can_be_root() { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi; }

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]; }

# install_packages NAME...: with apt, those that are missing. Daemons that come with a package are not started.
install_packages() {
    local name missing=()
    command -v dpkg-query >/dev/null || die "no dpkg here: on this distribution install by hand what docs/dependencies.md lists"
    for name in "$@"; do is_installed "$name" || missing+=("$name"); done
    [ ${#missing[@]} = 0 ] && return
    can_be_root || die "packages are missing, and there is no sudo; as root run
    apt-get update && apt-get install --no-install-recommends ${missing[*]}
and then this script again"
    echo "installing with apt: ${missing[*]}"
    local apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -q -o DPkg::Lock::Timeout=300)
    as_root "${apt[@]}" update </dev/null
    as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null ||
        die "apt could not install ${missing[*]}; its messages are above"
}

# The distribution's pyfuse3 is used where it is new enough: nobody needs a compiler then.
distribution_has_pyfuse3() {
    local version
    command -v apt-cache >/dev/null || return 1
    version=$(apt-cache policy python3-pyfuse3 2>/dev/null | awk '$1 == "Candidate:" {print $2}')
    if [ -z "$version" ] || [ "$version" = "(none)" ]; then return 1; fi
    dpkg --compare-versions "$version" ge "$oldest_pyfuse3"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the newest Python of at least 3.11; the distribution's own first, since its packages are importable from there alone.
find_python() {
    local python
    for python in /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3; do
        python=$(command -v "$python") || continue
        is_new_enough "$python" && echo "$python" && return
    done
    die "no Python 3.11 or newer found (Ubuntu 22.04 has 3.10 and is not supported)"
}

# prepare_machine [PACKAGE...]: everything that a mount needs and the packages named. Sets `python` and `venv_options`.
prepare_machine() {
    # A fresh image has no package lists, and without them no candidate version.
    if [ -z "$(apt-cache policy python3-pyfuse3 2>/dev/null)" ]; then
        can_be_root || die "there are no package lists, and no sudo; as root run apt-get update, and then this script again"
        echo "reading the package lists"
        as_root apt-get -q -o DPkg::Lock::Timeout=300 update </dev/null
    fi
    if distribution_has_pyfuse3 && { [ ! -x /usr/bin/python3 ] || is_new_enough /usr/bin/python3; }; then
        # setuptools and wheel build the project itself, which is pure Python without a compiler.
        install_packages fuse3 python3-pyfuse3 python3-trio python3-click python3-venv python3-setuptools python3-wheel "$@"
        venv_options=(--system-site-packages)
    else
        install_packages fuse3 python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev "$@"
        venv_options=()
    fi
    python=$(find_python)
}

# venv_place NAME: the directory for a virtual environment: in the checkout, else in the user's cache.
venv_place() {
    if [ -n "${PYOVERLAY_VENVS:-}" ]; then
        echo "$PYOVERLAY_VENVS/$1"
    elif [ -w "$checkout/.venvs" ] || { [ ! -e "$checkout/.venvs" ] && [ -w "$checkout" ]; }; then
        echo "$checkout/.venvs/$1"
    elif [ -n "${XDG_CACHE_HOME:-${HOME:-}}" ]; then
        echo "${XDG_CACHE_HOME:-$HOME/.cache}/pyoverlay/venvs/$1"
    else
        die "$checkout/.venvs is not writable and HOME is not set; say where environments may go with PYOVERLAY_VENVS=DIR"
    fi
}

# make_venv DIR PYTHON [OPTION...]: made if it is missing, made again if its Python is gone or another.
make_venv() {
    local venv=$1 python=$2
    shift 2
    local wanted
    wanted="$("$python" -c 'import sys; print(sys.version, sys.base_prefix)') $venv $*"
    if [ "$(cat "$venv/made-for" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then return; fi
    rm -rf -- "$venv"
    mkdir -p -- "$(dirname "$venv")"
    "$python" -m venv "$@" "$venv"
    echo "$wanted" >"$venv/made-for"
}

# The files an installation is made of, as paths relative to the checkout, NUL-separated.
source_files() {
    (cd "$checkout" && find . \( -path ./.git -o -path ./.venvs \) -prune -o -type f \
        \( -path './src/*' -o -path ./pyproject.toml -o -path ./setup.py -o -path ./README.md -o -path './docs/*.[18]' -o -path ./LICENSE \) \
        ! -path '*/.*' ! -path '*/__pycache__/*' ! -path '*.egg-info/*' ! -name '*.so' -print0 | LC_ALL=C sort -z)
}

# install_project VENV [EXTRA]: the checkout as it is now, not editable, so that what is tested is what people get. It is built in a
# copy: nothing is written to the checkout. Does nothing if the same sources are installed already.
install_project() {
    local venv=$1 extra=${2:-} state copy
    state="$extra $(command -v cc || echo 'no compiler') $(source_files | (cd "$checkout" && xargs -0 sha256sum) | sha256sum)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" = "$state" ]; then return; fi
    rm -f "$venv/installed"
    copy=$(mktemp -d)
    source_files | tar -C "$checkout" --null -T - -cf - | tar -C "$copy" -xf -
    local status=0
    install_from "$venv" "$copy" "$extra" || status=$?
    rm -rf -- "$copy"
    [ $status = 0 ] || die "pip could not install pyoverlay; its messages are above"
    echo "$state" >"$venv/installed"
}

install_from() {
    local venv=$1 copy=$2 extra=$3 wheels
    # What is there already (the distribution's setuptools, pyfuse3, trio and click) is used, so this asks no index in a venv that
    # sees the distribution's packages; elsewhere it fetches what is missing.
    "$venv/bin/python" -c 'import setuptools, wheel' 2>/dev/null || "$venv/bin/pip" -q install 'setuptools>=66' wheel || return
    "$venv/bin/pip" -q wheel --no-build-isolation --no-deps -w "$copy/dist" "$copy" || return
    wheels=("$copy"/dist/pyoverlay-*.whl)
    # The version number stays while the sources change: pip would keep what it has.
    "$venv/bin/pip" -q uninstall -y pyoverlay 2>/dev/null
    "$venv/bin/pip" -q install "${wheels[0]}${extra:+[$extra]}"
}
