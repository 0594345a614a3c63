#!/usr/bin/env bash
# Stop the Slurm that up.sh started: what its pid files name, if it is that program and was started on our folder.
# With --purge the folder ($BATCHPROC_SLURM_DIR) is removed as well.
set -uo pipefail
say() { printf 'slurm for tests: %s\n' "$*" >&2; }

dir=${BATCHPROC_SLURM_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/batchproc-slurm}
export SLURM_CONF=$dir/etc/slurm.conf
[ -f "$SLURM_CONF" ] || { say "nothing in $dir"; exit 0; }

ours() { # pid, program
  [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && tr '\0' ' ' <"/proc/$1/cmdline" | grep -qF -- "$dir/"
}
gone() { [ ! -d "/proc/$1" ] || grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }
stop() { # program
  local pid file=$dir/run/$1.pid
  pid=$(cat "$file" 2>/dev/null) || return 0
  rm -f "$file"
  ours "$pid" "$1" || return 0
  kill -TERM "$pid"
  for ((i = 0; i < 100; i++)); do gone "$pid" && break; sleep 0.1; done
  gone "$pid" || kill -KILL "$pid"
  say "$1 ($pid) stopped"
}

# First the jobs, so that nothing of theirs outlives slurmd.
if timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
  mapfile -t jobs < <(timeout 5 squeue --noheader --format=%A | sort -u)
  [ ${#jobs[@]} = 0 ] || timeout 10 scancel "${jobs[@]}"
  for ((i = 0; i < 100; i++)); do [ -z "$(timeout 5 squeue --noheader --format=%A)" ] && break; sleep 0.1; done
fi
stop slurmd
stop slurmctld
stop munged
[ "${1:-}" != --purge ] || { rm -rf -- "${dir:?}"; say "$dir removed"; }
