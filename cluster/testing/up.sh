#!/usr/bin/env bash
# Start a Slurm of one node (munged, slurmctld, slurmd) for the tests, as root, without systemd, cgroups or a database.
#
#   eval "$(cluster/testing/up.sh)"       # sets SLURM_CONF; sbatch, squeue, scancel then speak to this Slurm
#   cluster/testing/down.sh
#
# Everything it writes is under $BATCHPROC_SLURM_DIR (default: ~/.cache/batchproc-slurm); nothing listens but on 127.0.0.1.
# A second call finds what is running. Settings: BATCHPROC_SLURM_CPUS (8, which may be more than there are),
# BATCHPROC_SLURM_MEMORY (MB; 80 % of this machine's). With --install, missing packages are installed by apt-get.
# Standard output is lines to be evaluated, all else goes to standard error.
# Exit code: 0 ready; 77 Slurm cannot be had here; 1 it did not start.
set -euo pipefail
say() { printf 'slurm for tests: %s\n' "$*" >&2; }
unavailable() { say "$*"; exit 77; }

dir=${BATCHPROC_SLURM_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/batchproc-slurm}
cpus=${BATCHPROC_SLURM_CPUS:-8}
memory=${BATCHPROC_SLURM_MEMORY:-$(awk '/^MemTotal/ { print int($2 / 1024 * 0.8) }' /proc/meminfo)}
node=$(hostname -s)
export PATH=$PATH:/usr/sbin:/sbin

[ "$(id -u)" = 0 ] || unavailable "needs root: slurmd starts jobs as their owner"
missing() { ! command -v munged || ! command -v slurmctld || ! command -v slurmd; } >/dev/null
if missing; then
  [ "${1:-}" = --install ] || unavailable "slurm and munge are not installed: cluster/testing/up.sh --install"
  command -v apt-get >/dev/null || unavailable "no apt-get here; install slurm and munge by hand"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install -y --no-install-recommends slurm-wlm munge; } >&2 || unavailable "apt-get failed"
  ! missing || unavailable "slurm and munge are still not there"
fi

mkdir -p "$dir"/{etc,run,log}
mkdir -p -m 700 "$dir"/{munge,state}
mkdir -p -m 755 "$dir/spool"
export SLURM_CONF=$dir/etc/slurm.conf

running() { # program: whether the one that we started is still there
  local pid
  pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] \
    && ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status"
}
until_true() { # seconds, command
  local tenths=$(($1 * 10)); shift
  for ((i = 0; i < tenths; i++)); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
  return 1
}
failed() { say "$1 did not start:"; tail -n 5 "$dir/log/$1.log" >&2 || true; exit 1; }
free_port() { # from where on
  local port=$1
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

socket=$dir/run/munge.socket
if ! running munged; then
  [ -s "$dir/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
  rm -f "$socket" "$socket.lock"
  munged --force --key-file="$dir/munge/key" --seed-file="$dir/munge/seed" --socket="$socket" --num-threads=2 \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" >>"$dir/log/munged.log" 2>&1 || failed munged
fi
until_true 10 sh -c "munge --socket='$socket' --no-input | unmunge --socket='$socket'" || failed munged

if ! running slurmctld && ! running slurmd; then
  control=$(free_port 26817)
  daemon=$(free_port $((control + 1)))
  cat >"$SLURM_CONF" <<CONF
ClusterName=batchproc
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$control
SlurmdPort=$daemon
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
# Neither cgroups nor systemd: processes are found by their parents, and memory is looked at every 2 s.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MinJobAge=600
KillWait=2
SlurmdParameters=config_overrides
DefMemPerCPU=512
NodeName=$node NodeAddr=127.0.0.1 NodeHostname=$node CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=$node Default=YES MaxTime=60 DefaultTime=10 State=UP
CONF
  # From Slurm 23 on the daemons look for cgroups unless told otherwise.
  [ "$(slurmctld -V | tr -dc '0-9. ' | awk '{ print int($1) }')" -lt 23 ] || echo "CgroupPlugin=disabled" >"$dir/etc/cgroup.conf"
fi
for program in slurmctld slurmd; do
  running "$program" && continue
  rm -f "$dir/run/$program.pid"
  "$program" -f "$SLURM_CONF" >>"$dir/log/$program.log" 2>&1 || failed "$program"
done
until_true 20 sh -c "scontrol ping | grep -q 'is UP'" || failed slurmctld
ready() {
  case "$(sinfo --noheader --Node --format=%T | head -n 1)" in
    idle | mixed | allocated) ;;
    down* | drain*) scontrol update nodename="$node" state=resume; false ;; # left over from a hard stop
    *) false ;;
  esac
}
until_true 30 ready || failed slurmd

say "ready: $(slurmctld -V), node $node of $cpus CPUs and $memory MB, in $dir"
printf 'export SLURM_CONF=%q BATCHPROC_SLURM_DIR=%q\n' "$SLURM_CONF" "$dir"
