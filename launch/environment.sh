# shellcheck shell=bash
# Sourced as `source environment.sh runtime|dev`: leaves in $PYTHON an interpreter that can run the checkout in $ROOT.
#
# Without EP_PYTHON that is .venv in the checkout, made if missing and brought up to date if the pins changed. With
# EP_PYTHON it is that interpreter, which is checked and never installed into. csrc/ is built in place for either.
# `dev` adds what tests and checks need. Expects `set -euo pipefail`.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
BUILD_STAMP=$ROOT/build/.stamp

refuse() {
  echo "$*" >&2
  exit 2
}

# step WHAT COMMAND...: one line while it works, everything the command printed if it fails.
step() {
  local log=$ROOT/build/environment.log
  mkdir -p "$ROOT/build"
  echo "$1 ..." >&2
  "${@:2}" </dev/null >"$log" 2>&1 || {
    cat "$log" >&2
    echo "$1 failed: the output is above" >&2
    exit 1
  }
}

# supported PYTHON MODULES: it runs, is of a supported version and has the modules.
supported() {
  "$1" -I -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))" >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3; do
    # Tried, not looked up: a pyenv shim is on PATH also for a version that is not installed.
    if supported "$candidate" "venv, ensurepip"; then
      echo "$candidate"
      return
    fi
  done
  refuse "there is no Python 3.11 or 3.12 with its venv module on PATH; install one" \
    "(Debian, Ubuntu: apt install python3.11-venv) or set EP_PYTHON to an environment that has the dependencies"
}

need_compiler() {
  command -v "${CXX:-c++}" >/dev/null ||
    refuse "there is no C++ compiler (${CXX:-c++}) on PATH to build csrc/; install one (Debian, Ubuntu: apt install g++)"
}

# pip writes a package's RECORD last: without it, or with files missing, the package was cut off half-way.
packages_are_whole() {
  "$PYTHON" -I -c '
from importlib.metadata import distributions
for package in distributions():
    assert package.files, package.name
    for file in package.files:
        assert file.suffix == ".pyc" or file.locate().exists(), file
' >/dev/null 2>&1
}

pins() {
  # With the place, because the `ep-engine` command of a moved checkout points to where it was.
  { echo "$ROOT" && cd "$ROOT" && cat requirements.txt requirements-dev.txt pyproject.toml setup.py; } | sha256sum
}

prepare_venv() {
  local venv=$ROOT/.venv wanted base
  wanted=$(pins)
  PYTHON=$venv/bin/python
  if supported "$PYTHON" pip; then
    case $(cat "$venv/.pins" 2>/dev/null) in
      "$wanted $1" | "$wanted dev") return ;;
    esac
  fi

  need_compiler # before the long download
  if ! supported "$PYTHON" pip || ! packages_are_whole; then
    base=$(find_python)
    step "making .venv with $base" "$base" -m venv --clear "$venv"
  fi
  rm -f "$venv/.pins" # cut off from here on, it must not pass for up to date if the pins go back
  local pip=("$PYTHON" -I -m pip --disable-pip-version-check --no-input install)
  # Alone and first: resolved with what depends on it, pip may settle on another build or release of torch.
  step "installing torch" "${pip[@]}" "$(grep '^torch==' "$ROOT/requirements.txt")"
  case $1 in
    runtime) step "installing pinned packages" "${pip[@]}" -r "$ROOT/requirements.txt" ;;
    dev) step "installing pinned packages" "${pip[@]}" -r "$ROOT/requirements-dev.txt" ;;
  esac
  build_csrc "installing ep_engine, building csrc" "${pip[@]}" --no-deps --no-build-isolation --editable "$ROOT"
  echo "$wanted $1" >"$venv/.pins"
}

check_given_python() {
  local version advice="set it to a Python 3.11 or 3.12, or unset it"
  PYTHON=$(command -v "$EP_PYTHON") || refuse "EP_PYTHON ($EP_PYTHON) is not a program; $advice"
  [[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    refuse "EP_PYTHON ($EP_PYTHON) does not run as a Python; $advice"
  [[ $version == 3.1[12] ]] || refuse "EP_PYTHON ($EP_PYTHON) is Python $version; $advice"
  "$PYTHON" "$ROOT/launch/check_python.py" "$1" || exit 2
}

# What a build depends on. torch by its recorded version: importing it takes seconds.
stamp_of_build() {
  {
    "$PYTHON" -c 'import sys; from importlib import metadata; print(sys.executable, sys.version, metadata.version("torch"))'
    command -v nvcc || true
    cd "$ROOT" && find csrc setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum
}

# build_csrc WHAT COMMAND...
build_csrc() {
  local wanted
  wanted=$(stamp_of_build) # before the build: a file edited meanwhile is for the next one
  rm -f "$BUILD_STAMP"
  (cd "$ROOT" && step "$@" && step "loading csrc" "$PYTHON" -c "import ep_engine.ops")
  echo "$wanted" >"$BUILD_STAMP"
}

csrc_is_built() {
  [[ $(cat "$BUILD_STAMP" 2>/dev/null) == "$(stamp_of_build)" ]] && compgen -G "$ROOT/ep_engine/*.so" >/dev/null
}

command -v flock >/dev/null || refuse "there is no flock on PATH; install it (Debian, Ubuntu: apt install util-linux)"
exec 9>"$ROOT/.venv.lock"
flock --nonblock 9 || {
  echo "waiting for another script that prepares this checkout ..." >&2
  flock 9
}
if [[ -n ${EP_PYTHON:-} ]]; then check_given_python "$1"; else prepare_venv "$1"; fi
if ! csrc_is_built; then
  need_compiler
  build_csrc "building csrc" "$PYTHON" setup.py build_ext --inplace
fi
exec 9>&- # what runs next must not hold the lock

# A step allocates the same large buffers every time. glibc would give each back to the system and fault its pages in
# again, which costs a tenth of a CPU step: memory that was used once is kept.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
