#!/bin/bash
#SBATCH --job-name=fno
#SBATCH --comment=s3://bucket/runs/fno-{index}
#SBATCH --chdir=/tmp
#SBATCH --output=/tmp/keel-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --time=15
#SBATCH --signal=B:USR1@450
#SBATCH --array=0-4
#SBATCH --dependency=afterok:12:13
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --requeue
#SBATCH --switches=1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=524288M
#SBATCH --gres=gpu:8

export PYTHONPATH=/shared/keel
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s a test'
export KEEL_JOB="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
export KEEL_ARRAY_INDEX="$SLURM_ARRAY_TASK_ID"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
export KEEL_RENDEZVOUS="$address:29500"

told='' cancelled='' step=''
save() { if [[ -n "$step" ]]; then kill -USR1 "$step"; fi; }
trap 'told=1; save' USR1
trap 'cancelled=1; save' USR2
trap 'save' TERM

srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --export=ALL --kill-on-bad-exit=0 --wait=300 bash -c 'exec >>/tmp/keel-"$KEEL_JOB-node$SLURM_PROCID".log 2>&1
export KEEL_NODE="$SLURM_PROCID"
exec "$@"' node \
    python -P -m cluster.launch.node --run 's3://bucket/runs/fno-{index}' --nodes 2 --processes 8 --restarts 3 --heartbeat 10 --grace 300 --join-timeout 600 --lost 30 -- trainer fit 's3://bucket/runs/fno-{index}' &
step=$!
[[ -z "$told$cancelled" ]] || save

while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?

running() { scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING '; }
if [[ -n "$cancelled" ]] && running; then scancel "$SLURM_JOB_ID"; fi
# A run that is told to save while it starts cannot answer with 75; it has lost nothing.
if [[ -n "$told" && $code != 0 && $code != 2 ]]; then code=75; fi
# Nodes that lost each other, or their store, may meet again, but not for ever.
if [[ $code == 74 || $code == 69 ]] && (( ${SLURM_RESTART_COUNT:-0} < 3 )); then code=75; fi
if [[ $code == 75 && -z "$cancelled" ]] && running; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
