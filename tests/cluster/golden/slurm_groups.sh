#!/bin/bash
#SBATCH --job-name=fno
#SBATCH --comment=s3://bucket/runs/fno
#SBATCH --chdir=/tmp
#SBATCH --output=/tmp/keel-%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --requeue
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=1048576M
#SBATCH --gres=gpu:8
#SBATCH --constraint=big
#SBATCH hetjob
#SBATCH --partition=gpu
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=524288M
#SBATCH --gres=gpu:8

export PYTHONPATH=/shared/keel
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s a test'
export KEEL_JOB="$SLURM_JOB_ID"
export KEEL_PROGRESS_CODE=77
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
export KEEL_RENDEZVOUS="$address:$((15000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 15000))"

told='' cancelled='' step=''
save() { if [[ -n "$step" ]]; then kill -USR1 "$step"; fi; }
trap 'told=1; save' USR1
trap 'cancelled=1; save' USR2
trap 'save' TERM

lost="$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.*#lost=\([0-9]*\).*/\1/p' | head -n 1)"
begun="$(stat -Lc %s /proc/$$/fd/2)"
srun --het-group=0-1 --cpus-per-task=96 --export=ALL --kill-on-bad-exit=0 --wait=300 bash -c 'exec >>/tmp/keel-"$KEEL_JOB-node$SLURM_PROCID".log 2>&1
export KEEL_NODE="$SLURM_PROCID"
exec "$@"' node \
    python -P -m cluster.launch.node --run s3://bucket/runs/fno --nodes 4 --processes 8 --restarts 3 --heartbeat 10 --grace 300 --join-timeout 600 --lost 30 -- trainer fit s3://bucket/runs/fno &
step=$!
[[ -z "$told$cancelled" ]] || save

while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?

running() { scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING '; }
if [[ -n "$cancelled" ]] && running; then scancel "$SLURM_JOB_ID"; fi
# srun ends with the largest code of all nodes, and tells each of them in this job's log.
ended() { [[ -f /proc/$$/fd/2 ]] && tail -c "+$((begun + 1))" /proc/$$/fd/2 | grep -q "Exited with exit code $1$"; }
note() { scontrol update JobId="$SLURM_JOB_ID" Comment=s3://bucket/runs/fno"$1"; }
if ended 2; then code=2; fi
if ended 77; then lost=0; fi
if [[ $code == 77 ]]; then code=74; fi
if [[ -n "$told" && $code != 0 && $code != 2 ]]; then
    code=75  # a run that is told to save while it starts cannot answer so; it has lost nothing
elif [[ $code == 75 && -n "$lost" ]]; then
    note ''
elif [[ $code == 74 || $code == 69 ]] || { (( code > 128 )) && ! ended "$code"; }; then
    # Nodes that lost each other or their store, or were killed (one that exits so has seen its workers killed, and started
    # them again) may meet again, but not for ever.
    if (( ${lost:-0} < 3 )); then code=75; note "#lost=$((${lost:-0} + 1))"; fi
fi
if [[ $code == 75 && -z "$cancelled" ]] && running; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
