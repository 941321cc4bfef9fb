#!/usr/bin/env bash
# Make, or bring up to date, the virtual environment .venv of this checkout. `make setup` calls this when the lock file,
# pyproject.toml or tools/ changed since it last succeeded; running it again is harmless.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
stamp=$venv/.setup-done
lock=requirements-cpu.lock
python=${PYTHON:-python3.11}
needed_gb=7

# The Makefile puts .venv first on the PATH; the Python looked for here is the one that .venv is made from.
PATH=$(printf '%s' "$PATH" | tr ':' '\n' | grep -vxF "$venv/bin" | paste -sd:)
# Settings of the caller that would bring in another Python's packages, or send these elsewhere.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER

fail() { printf 'error: %s\n' "$1" >&2; shift; [ $# -eq 0 ] || printf '       %s\n' "$@" >&2; exit 1; }
say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }

check_machine() {
    case $root in *:*) fail "$root has a colon in it, which separates folders on the PATH; rename it" ;; esac
    [ "$(uname -s)" = Linux ] || fail "the CPU environment is locked for Linux; this is $(uname -s)"
    command -v "$python" >/dev/null || fail \
        "$python is not on the PATH; install Python 3.11 (Debian, Ubuntu: apt install python3.11 python3.11-venv" \
        "python3.11-dev) or name one: make setup PYTHON=/path/to/python3.11"
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
    [ "$version" = 3.11 ] || fail "$python is Python $version; the lock file needs 3.11: make setup PYTHON=/path/to/python3.11"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail \
        "$python can't make virtual environments; install its venv module (Debian, Ubuntu: apt install python3.11-venv)"
    command -v g++ >/dev/null || fail \
        "g++ is not on the PATH; torch compiles what vLLM runs with it (Debian, Ubuntu: apt install g++)"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
        || fail "the headers of $python (Python.h) are missing (Debian, Ubuntu: apt install python3.11-dev)"
    if [ ! -e "$venv/bin/ray" ]; then
        local free_gb
        free_gb=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
        [ "$free_gb" -ge "$needed_gb" ] || fail "the environment needs $needed_gb GB here, $root has $free_gb GB free"
    fi
}

make_venv() {
    local clear=()
    # A moved or copied checkout: the scripts in .venv/bin still name the old place.
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" != "$root" ]; then clear=(--clear); fi
    if [ ${#clear[@]} -gt 0 ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv "${clear[@]}" "$venv"
    fi
    rm -f "$stamp"
}

show_progress() {  # of pip's output: a line every 25 packages
    awk -v total="$1" '/^Collecting / && ++n % 25 == 0 {print "            found " n " of " total; fflush()}
        /^Installing collected/ {print "            unpacking"; fflush()}'
}

add_quietly() {  # a package whose dependencies are there
    "$venv/bin/python" -m pip install --no-input --quiet --no-deps "$@" 2>&1 | { grep -v '^WARNING: Location' || true; }
}

install_packages() {
    local total log=$venv/setup.log
    total=$(grep -c '^[A-Za-z]' "$lock")
    say "installing $total packages from $lock (two to three minutes; log: .venv/setup.log)"
    if ! "$venv/bin/python" -m pip install --no-input --progress-bar off --no-compile -r "$lock" 2>&1 | tee "$log" | show_progress "$total"
    then
        grep '^ERROR' "$log" >&2 || tail -n 5 "$log" >&2
        if grep -q '^ERROR.*torch==' "$log"; then
            fail "pip found no CPU build of torch; point it at one, for instance" \
                "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"
        fi
        fail "pip could not install the locked packages; the whole log is $log"
    fi
    # pip would do it on one core. Files that are no Python 3, such as templates, are left out as pip leaves them out.
    say "compiling them"
    "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
    say "linking this checkout into .venv"
    add_quietly "nixl$(sed -n 's/^nixl-cu12//p' "$lock")"
    add_quietly --no-build-isolation --editable .
}

check_machine
make_venv
install_packages
"$venv/bin/python" tools/repair_cpu_stack.py
printf '%s' "$root" >"$stamp"
say "done: $venv"
