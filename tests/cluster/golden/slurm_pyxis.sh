#!/bin/bash
#SBATCH --job-name=fno
#SBATCH --comment=s3://bucket/runs/fno
#SBATCH --chdir=/tmp
#SBATCH --output=/tmp/keel-%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --time=240
#SBATCH --signal=B:USR1@300
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=524288M
#SBATCH --gres=gpu:8
#SBATCH --exclusive

export NCCL_DEBUG=WARN
export NOTE='it'"'"'s a test'
export KEEL_JOB="$SLURM_JOB_ID"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
export KEEL_RENDEZVOUS="$address:$((15000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 15000))"

told='' cancelled='' step=''
save() { if [[ -n "$step" ]]; then kill -USR1 "$step"; fi; }
trap 'told=1; save' USR1
trap 'cancelled=1; save' USR2
trap 'save' TERM

srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --export=ALL --kill-on-bad-exit=0 --wait=300 '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/tmp:/tmp,/scratch:/scratch bash -c 'exec >>/tmp/keel-"$KEEL_JOB-node$SLURM_PROCID".log 2>&1
export KEEL_NODE="$SLURM_PROCID"
exec "$@"' node \
    python -P -m cluster.launch.node --run s3://bucket/runs/fno --nodes 2 --processes 8 --restarts 3 --heartbeat 10 --grace 300 --join-timeout 600 --lost 30 -- trainer fit s3://bucket/runs/fno &
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
