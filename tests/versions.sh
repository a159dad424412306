#!/usr/bin/env bash
# The tests with other versions of Python, JAX and the other dependencies. See --help.
set -u

usage() {
  cat <<'EOF'
tests/versions.sh [--folder DIR] [--python VERSION] [PYTEST ARGUMENT...]

Installs the package into one virtual environment per combination of versions and runs the tests in each:

  Python 3.11, JAX 0.10.0    lowest   all others (with the extra "data") at the lower bounds in pyproject.toml
  Python 3.12, JAX 0.11      pinned   all other dependencies as in constraints.txt
  Python 3.13, JAX 0.12      newest   all dependencies at their newest releases

  --folder DIR        Directory of the environments, about 1.5 GB each; kept and updated when pyproject.toml,
                      constraints.txt or this script has changed. Default: a temporary directory.
  --python VERSION    Only the environment of this Python version, e.g. 3.12.
  -h, --help          This text.

All other arguments are passed to pytest, e.g. tests/models -x. By default the fast tests run. Interpreters are
python3.11, python3.12 and python3.13 on PATH, or those that uv or pyenv has installed.

Prints one line per environment: versions, the tests passed and failed, and the CPU time in seconds. The output of pip
and pytest is written to DIR/pythonVERSION.log; the log of an environment that fails is shown. The exit code is 0 if all
tests pass in all environments, 2 for invalid arguments, and 1 otherwise.
EOF
}

# Python, JAX, how all other dependencies are chosen
readonly ENVIRONMENTS=("3.11 0.10.0 lowest" "3.12 0.11.* pinned" "3.13 0.12.* newest")

say() { printf 'versions.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
folder="" only=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --folder | --python)
      [ $# -ge 2 ] || fail "$1 requires a value; see --help"
      case $1 in
        --folder) folder=$2 ;;
        --python) only=$2 ;;
      esac
      shift 2 ;;
    *) break ;;
  esac
done

# Prints the path of an interpreter of this version. A pyenv shim is on PATH, but only runs if its version is selected.
find_python() {
  local path
  while read -r path; do
    if [ -n "$path" ] && "$path" -c "" 2>/dev/null; then
      printf '%s\n' "$path"
      return
    fi
  done < <(
    command -v "python$1"
    command -v uv >/dev/null && uv python find --no-project "$1" 2>/dev/null
    command -v pyenv >/dev/null && printf '%s\n' "$(pyenv root)"/versions/"$1".*/bin/python
  )
  return 1
}

# Prints the constraints of an environment; JAX itself has its version from the command line of pip.
constraints() {
  case $1 in
    newest) ;;
    pinned) grep -viE '^(jax|jaxlib)==' "$here/constraints.txt" ;;
    lowest) "$2" - "$here/pyproject.toml" <<'EOF' ;;
import re
import sys
import tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["data"]:
    if bound := re.fullmatch(r"([\w.-]+)>=([\w.]+).*", requirement):
        if bound[1] != "jax":
            print(f"{bound[1]}=={bound[2]}")
EOF
  esac
}

# install FOLDER PYTHON JAX CHOICE
install() {
  rm -f "$1/ready"
  [ -x "$1/bin/python" ] || "$2" -m venv "$1" || return
  constraints "$4" "$2" >"$1/constraints.txt" || return
  (cd "$here" && "$1/bin/python" -m pip install --disable-pip-version-check --quiet --upgrade --upgrade-strategy eager \
    --prefer-binary --constraint "$1/constraints.txt" "jax==$3" "jaxlib==$3" --editable '.[data,clients,dev]') || return
  touch "$1/ready"
}

# is_current FOLDER CHOICE; the newest releases of today are not those of an earlier run
is_current() {
  local file
  [ "$2" != newest ] || return
  for file in pyproject.toml constraints.txt tests/versions.sh; do
    [ "$1/ready" -nt "$here/$file" ] || return
  done
}

# run_tests PYTHON LOG [PYTEST ARGUMENT...]: prints the CPU time of the tests and of all processes they start
run_tests() {
  local python=$1 log=$2 TIMEFORMAT='%U %S'
  shift 2
  cd "$here" || return
  { time "$python" -m pytest "$@" >"$log" 2>&1 </dev/null; } 2>&1
}

# check PYTHON JAX CHOICE [PYTEST ARGUMENT...]: one environment, one line
check() {
  local version=$1 jax=$2 choice=$3 python environment log code=0 result seconds
  shift 3
  environment=$folder/python$version log=$folder/python$version.log
  if ! python=$(find_python "$version"); then
    echo "Python $version  JAX $jax  no interpreter found: install python$version"
    return 1
  fi
  if ! is_current "$environment" "$choice" && ! install "$environment" "$python" "$jax" "$choice" >"$log" 2>&1; then
    cat "$log"
    echo "Python $version  JAX $jax  $choice  not installed"
    return 1
  fi
  seconds=$(run_tests "$environment/bin/python" "$log" "$@") || code=1
  [ $code -eq 0 ] || cat "$log"
  result=$(grep -E '^=+ .* in .*=+$|^[0-9]+ [a-z]+.* in [0-9.]+s' "$log" | tail -n 1 | sed -E 's/^=+ | in [0-9].*//g')
  "$environment/bin/python" - "$choice" "${result:-no result}" "$seconds" <<'EOF'
import platform
import sys
from importlib.metadata import version

choice, result, seconds = sys.argv[1:]
print(f"Python {platform.python_version()}  JAX {version('jax')}  {choice}  {result}  "
      f"{sum(map(float, seconds.split())):.0f} CPU-seconds")
EOF
  return $code
}

if [ -z "$folder" ]; then
  folder=$(mktemp -d) || exit 2
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || fail "$folder: cannot be created"
failed=0 found=0
for environment in "${ENVIRONMENTS[@]}"; do
  read -r version jax choice <<<"$environment"
  [ -z "$only" ] || [ "$only" = "$version" ] || continue
  found=1
  check "$version" "$jax" "$choice" "$@" || failed=1
done
[ $found -eq 1 ] || fail "--python $only: expected 3.11, 3.12 or 3.13"
exit $failed
