#!/usr/bin/env bash
# A real Slurm on this machine: munged, slurmctld and N slurmd, each with a port of its own; no systemd, no cgroups.
#
#   scripts/services/slurm.sh up DIR [NODES]     start (or find running) nodes n1 ... nN; prints SLURM_CONF as an export
#   eval "$(scripts/services/slurm.sh up DIR)"   ... and sets it, after which sbatch, squeue, scontrol work
#   scripts/services/slurm.sh kill DIR NODE      end a node as a power cut does: slurmd and all that it started
#   scripts/services/slurm.sh start DIR NODE     start a node again
#   scripts/services/slurm.sh down DIR           cancel what runs, then stop by process id; `up` goes on with the same DIR
#
# Partitions: main (all nodes), small (n1, at most 10 minutes) and urgent (all nodes; its jobs preempt those of main, which
# are requeued). Listens on 127.0.0.1, on free ports. Missing packages are installed with apt where this is root (exit
# code 3 where it is not). Read when DIR is made:
#   KEEL_SLURM_CPUS     CPUs of each node (default 2; more than there are is fine)
#   KEEL_SLURM_MEMORY   MiB of each node (default 4000), or one number per node: "8000 4000"
#   KEEL_SLURM_TIMEOUT  seconds after which a silent node is down (default 10)
set -euo pipefail
unset SLURM_CONF

PACKAGES=(slurm-wlm munge)
PROGRAMS=(munged slurmctld slurmd sbatch scontrol sinfo scancel)
PATH="$PATH:/usr/sbin:/sbin"  # where Debian puts daemons, and where users do not look

fail() { printf 'slurm.sh: error: %s\n' "$1" >&2; exit "${2:-1}"; }

usage() { fail "usage: slurm.sh up DIR [NODES] | slurm.sh kill|start DIR NODE | slurm.sh down DIR" 2; }

missing() {
    local program
    for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || { echo "$program"; return; }; done
}

install_packages() {
    [[ -n "$(missing)" ]] || return 0
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null \
        || fail "Slurm is not installed; as root on Debian: apt-get install --no-install-recommends ${PACKAGES[*]}" 3
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}"
    } >"$dir/log/apt.log" 2>&1 || fail "apt could not install ${PACKAGES[*]}; its log: $dir/log/apt.log" 3
    [[ -z "$(missing)" ]] || fail "$(missing) is still missing after installing ${PACKAGES[*]}" 3
}

# Ports that nothing listens on, below those that the kernel gives to outgoing connections.
free_ports() {
    python3 - "$@" <<'PY'
import random, socket, sys
found, held = [], []
while len(found) < int(sys.argv[1]):
    port, probe = random.randrange(10000, 15000), socket.socket()
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        continue
    held.append(probe)  # kept open, so that no port is found twice
    found.append(str(port))
print(*found)
PY
}

# The process of a pid file, if it still is one of ours: a pid alone may have gone to another program since.
running() { # name
    local pid
    pid="$(cat "$dir/run/$1.pid" 2>/dev/null)" || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -qF -- "$dir/" || return 1
    [[ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -c1)" != Z ]] && echo "$pid"
}

launch() { # name, program and arguments; in the foreground of a session of its own, so that its pid is known
    local name=$1; shift
    running "$name" >/dev/null && return
    SLURM_CONF="$dir/slurm.conf" setsid "$@" >>"$dir/log/$name.out" 2>&1 </dev/null &
    echo $! >"$dir/run/$name.pid"
}

start_munged() {
    launch munged munged --foreground --force --socket="$dir/run/munge.sock" --key-file="$dir/munge.key" \
        --pid-file="$dir/run/munged.own.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
    local i
    for ((i = 0; i < 100; i++)); do
        [[ -S "$dir/run/munge.sock" ]] && return
        running munged >/dev/null || fail "munged stopped; its log: $dir/log/munged.out"
        sleep 0.05
    done
    fail "munged does not open its socket; its log: $dir/log/munged.log"
}

start_node() { KEEL_SLURM_NODE=$1 launch "slurmd-$1" slurmd -D -N "$1" -f "$dir/slurm.conf"; }

# What a node has started. Steps and their tasks leave slurmd's process group, but a step inherits what slurmd was started
# with, and a task is told where it is.
kill_started() { # node
    local environ settings pid
    for environ in /proc/[0-9]*/environ; do
        settings="$({ tr '\0' '\n' <"$environ"; } 2>/dev/null | grep -aE '^(SLURM_CONF|KEEL_SLURM_NODE|SLURMD_NODENAME)=')" || continue
        grep -qxF "SLURM_CONF=$dir/slurm.conf" <<<"$settings" || continue
        grep -qxE "(KEEL_SLURM_NODE|SLURMD_NODENAME)=$1" <<<"$settings" || continue
        pid="${environ#/proc/}"
        kill -9 "${pid%/environ}" 2>/dev/null || true
    done
}

configure() { # number of nodes
    local count=$1 ports i memory user host
    user="$(id -un)"; host="$(hostname -s)"
    read -ra ports <<<"$(free_ports $((count + 1)))"
    read -ra memory <<<"${KEEL_SLURM_MEMORY:-4000}"
    (umask 077; head -c 1024 /dev/urandom >"$dir/munge.key")
    {
        cat <<CONF
ClusterName=keel
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until the credentials of its last start have expired.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.own.pid
SlurmdPidFile=$dir/run/slurmd-%n.own.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# The nodes are as large as this file says, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=${KEEL_SLURM_TIMEOUT:-10}
KillWait=10
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
        for ((i = 1; i <= count; i++)); do
            echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=${KEEL_SLURM_CPUS:-2}" \
                "RealMemory=${memory[i - 1]:-${memory[-1]}} State=UNKNOWN"
        done
        cat <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=small Nodes=n1 MaxTime=10 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
CONF
    } >"$dir/slurm.conf.new"
    echo "$count" >"$dir/nodes"
    mv "$dir/slurm.conf.new" "$dir/slurm.conf"
}

ready() { [[ "$(timeout 5 sinfo -h -N -p main -t idle,alloc,mix,comp -o %N 2>/dev/null | wc -l)" == "$1" ]]; }

up() {
    local count i
    mkdir -p "$dir"/{log,run,state,spool}
    install_packages
    if [[ -f "$dir/slurm.conf" ]]; then
        count="$(cat "$dir/nodes")"
        [[ -z "$wanted" || "$wanted" == "$count" ]] || fail "$dir is made for $count nodes; use that, or another DIR"
    else
        count="${wanted:-2}"
        configure "$count"
    fi
    start_munged
    launch slurmctld slurmctld -D -f "$dir/slurm.conf"
    for ((i = 1; i <= count; i++)); do start_node "n$i"; done
    export SLURM_CONF="$dir/slurm.conf"
    for ((i = 0; i < 200; i++)); do
        if ready "$count"; then
            printf 'export SLURM_CONF=%s\n' "$dir/slurm.conf"
            return
        fi
        running slurmctld >/dev/null || fail "slurmctld stopped; its log: $dir/log/slurmctld.log"
        sleep 0.1
    done
    fail "the nodes do not register; the logs: $dir/log"
}

# Ends a process politely, then by force.
stop_one() { # name
    local pid i
    pid="$(running "$1")" || { rm -f "$dir/run/$1.pid"; return 0; }
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < 60; i++)); do running "$1" >/dev/null || break; sleep 0.05; done
    if running "$1" >/dev/null; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$dir/run/$1.pid"
}

down() {
    local i
    [[ -f "$dir/slurm.conf" ]] || return 0
    if running slurmctld >/dev/null; then
        export SLURM_CONF="$dir/slurm.conf"
        timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
        timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
        for ((i = 0; i < 50; i++)); do
            [[ -n "$(timeout 5 squeue -h -o %i 2>/dev/null)" ]] || break
            sleep 0.1
        done
    fi
    for ((i = 1; i <= $(cat "$dir/nodes"); i++)); do stop_one "slurmd-n$i"; done
    stop_one slurmctld
    stop_one munged
    for ((i = 1; i <= $(cat "$dir/nodes"); i++)); do kill_started "n$i"; done
}

kill_node() { # name
    local pid
    pid="$(running "slurmd-$1")" || fail "node $1 does not run"
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$dir/run/slurmd-$1.pid"
    kill_started "$1"
}

[[ $# -ge 2 ]] || usage
dir="$(realpath -m -- "$2")"
wanted="${3:-}"
case "$1" in
    up) [[ "$wanted" =~ ^([1-9][0-9]*)?$ ]] || usage; up ;;
    kill | start)
        [[ -n "$wanted" && -f "$dir/slurm.conf" ]] || usage
        grep -q "^NodeName=$wanted " "$dir/slurm.conf" || fail "no node $wanted in $dir/slurm.conf"
        if [[ "$1" == kill ]]; then kill_node "$wanted"; else start_node "$wanted"; fi ;;
    down) down ;;
    *) usage ;;
esac
