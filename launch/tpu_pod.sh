#!/usr/bin/env bash
# Starts one run on all hosts of a TPU pod slice. See --help.
set -u -o pipefail

usage() {
  cat <<'EOF'
launch/tpu_pod.sh --tpu NAME --zone ZONE [options] -- --config=FILE --workdir=DIR [more flags]

Copies the repository to all hosts of a Cloud TPU VM and runs the same command on each; JAX detects
the hosts. DIR must be on a file system that all hosts share (Filestore, or a bucket mounted with
gcsfuse).

  --tpu NAME       Name of the TPU VM.
  --zone ZONE      Zone of the TPU VM.
  --project NAME   Project of the TPU VM. Default: that of gcloud.
  --restarts R     Restart the run at most R times when it ends with exit code 75, "to be continued".
                   Default: 0.
  --python NAME    Python on the hosts, 3.11 to 3.13. Default: python3.
  --no-setup       Do not copy or install anything on the hosts.
  -h, --help       This text.

Example, after `gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 ...`:

  launch/tpu_pod.sh --tpu pod --zone us-west4-a --restarts 5 -- \
      --config=configs/spice.py --workdir=/mnt/runs/spice

To stop a run and resume it later, use --stop instead of the flags of the program.

  --stop           Send SIGTERM to the run on all hosts: it writes a checkpoint and ends with exit
                   code 75.

EOF
}

say() { printf 'tpu_pod.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

readonly STOPPED=75 FOLDER=mlip_jax_run
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
tpu="" zone="" project=() restarts=0 python=python3 setup=1 stop=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --no-setup) setup=""; shift ;;
    --stop) stop=1; shift ;;
    --tpu | --zone | --project | --restarts | --python)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case $1 in
        --tpu) tpu=$2 ;;
        --zone) zone=$2 ;;
        --project) project=(--project "$2") ;;
        --restarts) restarts=$2 ;;
        --python) python=$2 ;;
      esac
      shift 2 ;;
    *) fail "unknown option $1; flags of the program come after --. See --help" ;;
  esac
done
[ -n "$tpu" ] && [ -n "$zone" ] || fail "--tpu NAME and --zone ZONE are required. See --help"
[[ $restarts =~ ^[0-9]{1,4}$ ]] || fail "--restarts $restarts: expected a number, 0 or more"
[ -n "$stop" ] || [ $# -gt 0 ] || fail "no flags for the program; give them after --. See --help"
command -v gcloud > /dev/null || fail "gcloud not found: https://cloud.google.com/sdk/docs/install"

tpu_vm() { # verb, arguments
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$@" --zone "$zone" ${project[@]+"${project[@]}"} --worker=all
}

on_all() { tpu_vm ssh "$tpu" --command "$1"; }

if [ -n "$stop" ]; then
  # the brackets keep the pattern from matching the shell that holds it
  on_all "pkill -TERM -f '[-]m mlip_jax.main'" || fail "no run on these hosts, or gcloud failed"
  exit 0
fi

if [ -n "$setup" ]; then
  archive=$(mktemp -d) || exit 2
  trap 'rm -rf "$archive"' EXIT
  # tracked files, in the state of the working tree
  (cd "$here" && git ls-files -z | tar --null --files-from=- -czf "$archive/mlip_jax.tar.gz") ||
    fail "$here: the repository cannot be packed"
  tpu_vm scp "$archive/mlip_jax.tar.gz" "$tpu:" || fail "copying the repository failed"
  on_all "rm -rf $FOLDER && mkdir $FOLDER && tar -xzf mlip_jax.tar.gz -C $FOLDER && cd $FOLDER && \
$(printf %q "$python") -m venv --system-site-packages .venv && .venv/bin/pip install --quiet -e '.[tpu]'" ||
    fail "installing failed"
fi

# gcloud may return its own exit code instead of that of a host, so the command prints it as well.
command="cd $FOLDER && MLIP_JAX_COORDINATOR=auto .venv/bin/python -u -m mlip_jax.main$(printf ' %q' "$@"); \
code=\$?; echo \"mlip_jax exit code \$code\"; exit \$code"
for ((attempt = 0; ; attempt++)); do
  output=$(mktemp) || exit 2
  on_all "$command" 2>&1 | tee "$output"
  code=${PIPESTATUS[0]}
  said=$(sed -n 's/.*mlip_jax exit code \([0-9]*\).*/\1/p' "$output" | sort -u)
  rm -f "$output"
  # all hosts printed this code, and no other
  if [ "$said" = "$STOPPED" ]; then code=$STOPPED; fi
  if [ "$code" -ne "$STOPPED" ] || [ "$attempt" -ge "$restarts" ]; then exit "$code"; fi
  say "to be continued (exit code $STOPPED): restart $((attempt + 1)) of at most $restarts"
done
