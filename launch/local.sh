#!/usr/bin/env bash
# Starts one run on this machine as several processes. See --help.
set -u

usage() {
  cat <<'EOF'
launch/local.sh -n N [options] -- --config=FILE [--workdir=DIR] [more flags of the program]

Starts N processes of one run on this machine. Process 0 writes to the console, process K to
DIR/process_K.log. The short form of the command works as well: relax --force_field runs/spice FILE.

  -n N                       Number of processes.
  --devices-per-process K    Number of GPUs per process; on a CPU (JAX_PLATFORMS=cpu, or no GPU) of
                             virtual devices. Default: all GPUs, distributed evenly; one CPU device.
  --restarts R               Restart the run at most R times when it ends with exit code 75, "to be
                             continued". Default: 0.
  --logs DIR                 Directory of the logs. Default: the workdir.
  -m MODULE                  Python module to run. Default: mlip_jax.main.
  -h, --help                 This text.

Python is $PYTHON, or .venv/bin/python of the repository, or python3.

SIGTERM, SIGINT and SIGUSR1 are passed on to all processes, which finish their step and write a
checkpoint. Rerun the same command to resume. When a process dies, the others are ended within 20
seconds, and its exit code and the end of its log are shown. The exit code is that of the process
that failed first, 75 for a run that was stopped, or 0.
EOF
}

say() { printf 'local.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

# Seconds that the other processes have to end by themselves after one failed, or after the run was
# stopped. They notice a killed process after 12 s at most, and report which one it was.
readonly GRACE_FAILED=20 GRACE_STOPPED=60
readonly STOPPED=75 PEER_FAILED=76

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
count="" devices="" restarts=0 logs="" module=mlip_jax.main
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -n | --devices-per-process | --restarts | --logs | -m)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case $1 in
        -n) count=$2 ;;
        --devices-per-process) devices=$2 ;;
        --restarts) restarts=$2 ;;
        --logs) logs=$2 ;;
        -m) module=$2 ;;
      esac
      shift 2 ;;
    *) fail "unknown option $1; flags of the program come after --. See --help" ;;
  esac
done
is_count() { [[ $1 =~ ^[1-9][0-9]{0,3}$ ]]; }
[ -n "$count" ] || fail "how many processes? Give -n N. See --help"
is_count "$count" || fail "-n $count: expected a number, 1 or more"
[ -z "$devices" ] || is_count "$devices" || fail "--devices-per-process $devices: expected a number, 1 or more"
[ "$restarts" = 0 ] || is_count "$restarts" || fail "--restarts $restarts: expected a number, 0 or more"
[ $# -gt 0 ] || fail "no flags for the program; give them after --. See --help"

workdir="" previous=""
for argument in "$@"; do
  case $argument in --workdir=* | -workdir=*) workdir=${argument#*=} ;; esac
  case $previous in --workdir | -workdir) workdir=$argument ;; esac
  previous=$argument
done
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x "$here/.venv/bin/python" ]; then python=$here/.venv/bin/python; else python=python3; fi
fi
command -v "$python" > /dev/null || fail "$python: no such program; set PYTHON"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# Without -P, Python would import modules of the current folder in place of installed ones.
program=("$python" -P -m "$module")
[ "$module" = mlip_jax.main ] || program=("$python" -m "$module") # may be in the current folder

if [ -z "$workdir" ]; then # the program chooses one, and all processes use it
  workdir=$("${program[@]}" "$@" --show_workdir) || exit 2
  workdir=${workdir##*$'\n'}
  set -- "$@" "--workdir=$workdir"
fi
logs=${logs:-$workdir}
mkdir -p "$logs" || fail "$logs: the directory of the logs cannot be created"

# Available GPUs, numbered as in CUDA_VISIBLE_DEVICES.
gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=, read -r -a gpus <<< "$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi > /dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)
  fi
fi
share=0
if [ ${#gpus[@]} -gt 0 ]; then
  share=${devices:-$((${#gpus[@]} / count))}
  [ "$share" -gt 0 ] ||
    fail "${#gpus[@]} GPU(s) for $count processes: a GPU serves one process. Lower -n, or set JAX_PLATFORMS=cpu"
  [ $((share * count)) -le ${#gpus[@]} ] || fail "$count processes with $share GPUs each, but there are ${#gpus[@]} GPUs"
  [ -n "$devices" ] || [ $((share * count)) -eq ${#gpus[@]} ] ||
    fail "${#gpus[@]} GPUs cannot be distributed evenly to $count processes: change -n or set --devices-per-process"
fi

pids=() codes=() signals=""

log_of() { printf '%s/process_%s.log' "$logs" "$1"; }

# Sets `port` to a free port, which another process holds until this script ends, so that a run
# started at the same time cannot choose it as well. It does not listen: process 0 shares the port.
hold_port() {
  coproc HOLDER { exec "$python" -P -c '
import socket, sys
held = socket.socket()
for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
    held.setsockopt(socket.SOL_SOCKET, option, 1)
held.bind(("localhost", 0))  # the system chooses a port that no other socket holds
print(held.getsockname()[1], flush=True)
sys.stdin.read()
'; }
  read -r port <&"${HOLDER[0]}" || fail "$python: no free port found"
}

start_process() { # number, port, flags of the program
  local number=$1 port=$2
  shift 2
  export MLIP_JAX_COORDINATOR=localhost:$port MLIP_JAX_NUM_PROCESSES=$count MLIP_JAX_PROCESS_ID=$number
  if [ "$share" -gt 0 ]; then
    local mine=("${gpus[@]:number * share:share}")
    CUDA_VISIBLE_DEVICES=$(IFS=,; printf '%s' "${mine[*]}")
    export CUDA_VISIBLE_DEVICES
  elif [ -n "$devices" ]; then
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  fi
  if [ "$number" = 0 ]; then exec "${program[@]}" "$@"; fi
  if [ -L "$(log_of "$number")" ]; then fail "$(log_of "$number") is a symbolic link; remove it"; fi
  printf -- '--- %s\n' "$(date '+%F %T')" >> "$(log_of "$number")"
  exec "${program[@]}" "$@" >> "$(log_of "$number")" 2>&1 < /dev/null
}

pass_on() { # signal
  local number
  signals+=" $1"
  say "SIG$1: passed on to all processes"
  for number in "${!pids[@]}"; do
    # until its exit code is collected, the process ID cannot be reused
    [ -n "${codes[number]:-}" ] || kill -s "$1" "${pids[number]}" 2> /dev/null
  done
}

end_others() {
  local number
  for number in "${!pids[@]}"; do
    # its group includes the processes that it started
    [ -n "${codes[number]:-}" ] || kill -s KILL -- "-${pids[number]}" 2> /dev/null
  done
}

report() { # number of a process that failed
  say "process $1 ended with exit code ${codes[$1]}"
  [ "$1" = 0 ] || { say "the end of $(log_of "$1"):"; tail -n 20 "$(log_of "$1")" >&2; }
}

collect() { # record the exit codes of ended processes; the first that failed is the culprit
  local number
  for number in "${!pids[@]}"; do
    [ -n "${codes[number]:-}" ] && continue
    kill -0 "${pids[number]}" 2> /dev/null && continue
    wait "${pids[number]}" 2> /dev/null
    codes[number]=$?
    case ${codes[number]} in
      0) ;;
      "$STOPPED") [ -n "$deadline" ] || deadline=$((SECONDS + GRACE_STOPPED)) ;;
      "$PEER_FAILED") [ -n "$deadline" ] || deadline=$((SECONDS + GRACE_FAILED)) ;;
      *)
        # processes that this script ended are not to blame
        [ -n "$culprit" ] || [ -n "$ended" ] || { culprit=$number; report "$number"; }
        [ -n "$deadline" ] || deadline=$((SECONDS + GRACE_FAILED)) ;;
    esac
  done
}

run_once() { # flags of the program
  local number port deadline="" culprit="" ended=""
  hold_port
  pids=() codes=()
  # separate process groups: Ctrl-C reaches only this script, which passes it on once
  set -m
  for ((number = 0; number < count; number++)); do
    start_process "$number" "$port" "$@" &
    pids[number]=$!
  done
  set +m
  while collect; [ ${#codes[@]} -lt "$count" ]; do
    if [ -n "$deadline" ] && [ -z "$ended" ] && [ $SECONDS -ge "$deadline" ]; then
      say "ending the remaining processes"
      ended=1
      end_others
    fi
    sleep 0.2
  done
  if [ -n "$culprit" ]; then return "${codes[culprit]}"; fi
  # a process that was stopped individually takes the others with it
  case " ${codes[*]} " in
    *" $STOPPED "*) return "$STOPPED" ;;
    *" $PEER_FAILED "*) return "$PEER_FAILED" ;;
  esac
  if [ -n "$ended" ]; then return 1; fi
  return 0
}

for name in TERM INT USR1; do
  # shellcheck disable=SC2064 # the current value is intended
  trap "pass_on $name" "$name"
done
trap 'pass_on TERM' HUP
trap end_others EXIT
for ((attempt = 0; ; attempt++)); do
  run_once "$@"
  code=$?
  if [ "$code" -ne "$STOPPED" ] || [ -n "$signals" ] || [ "$attempt" -ge "$restarts" ]; then exit "$code"; fi
  say "to be continued (exit code $STOPPED): restart $((attempt + 1)) of at most $restarts"
done
