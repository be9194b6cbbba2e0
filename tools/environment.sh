# Makes the virtual environment that quickstart and test share. Sourced, from the checkout's root.
#
#   make_environment DIRECTORY [EXTRA]
#
# Does nothing when the environment is up to date: a stamp in it says for which pyproject.toml,
# checkout and extra it was made.

say() {
    printf '%s\n' "$*" >&2
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    say "Python 3.11 or newer is needed and was not found. On Debian 12 or later: apt install python3"
    return 1
}

make_environment() {
    local venv=$1 extra=${2:-} stamp digest python
    stamp="$venv/understudy.stamp"
    digest="$(cksum <pyproject.toml) $PWD"
    # An environment with the extra will do for one without.
    if [ -x "$venv/bin/understudy" ] &&
        { [ "$(cat "$stamp" 2>/dev/null)" = "$digest $extra" ] ||
            { [ -z "$extra" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$digest test" ]; }; }; then
        return 0
    fi
    # The scripts of an environment name its directory, so one that was moved is made anew.
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null ||
        { [ -e "$stamp" ] && ! grep -qF " $PWD " "$stamp"; }; then
        python=$(find_python) || return 1
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            say "$python cannot make virtual environments. On Debian: apt install python3-venv"
            return 1
        fi
        say "Making $venv with $("$python" --version) ..."
        "$python" -m venv --clear "$venv" || return 1
    fi
    # torch comes first and pinned: this release is the one that is tested, and where an index
    # offers builds for CPUs alone it has one, without gigabytes of GPU libraries. What is there
    # already and within pyproject.toml's range stays: it may be a build for this machine's GPU.
    if ! "$venv/bin/python" - <<'PYTHON'; then
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    found = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
except PackageNotFoundError:
    sys.exit(1)
sys.exit(not (2, 11) <= found < (2, 14))
PYTHON
        say "Installing torch 2.13.0 (once; it takes a while) ..."
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 ||
            return 1
    fi
    say "Installing understudy and what it needs ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable ".${extra:+[$extra]}" || return 1
    printf '%s\n' "$digest $extra" >"$stamp"
}
