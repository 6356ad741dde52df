#!/bin/bash
#SBATCH --job-name=fno
#SBATCH --comment=s3://bucket/runs/fno
#SBATCH --chdir=/tmp
#SBATCH --output=/tmp/keel-%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --time=240
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=524288M

export NCCL_DEBUG=WARN
export NOTE='it'"'"'s a test'
export KEEL_JOB="$SLURM_JOB_ID"
export KEEL_PROGRESS_CODE=77

told='' cancelled='' step=''
save() { if [[ -n "$step" ]]; then kill -USR1 "$step"; fi; }
trap 'told=1; save' USR1
trap 'cancelled=1; save' USR2
trap 'save' TERM

lost="$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.*#lost=\([0-9]*\).*/\1/p' | head -n 1)"
begun="$(stat -Lc %s /proc/$$/fd/2)"
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=96 --export=ALL --kill-on-bad-exit=0 --wait=300 bash -c 'exec >>/tmp/keel-"$KEEL_JOB-node$SLURM_PROCID".log 2>&1
export KEEL_NODE="$SLURM_PROCID"
exec "$@"' node \
    python -P -c 'import hashlib, io, os, shutil, signal, sys, tarfile, tempfile, time
for told in (signal.SIGTERM, signal.SIGUSR1):  # nothing is lost, and as process 1 it would hear nothing
    signal.signal(told, lambda *_: sys.exit(75))
url, digest, args = sys.argv[1], sys.argv[2], sys.argv[3:]
home = os.environ.get("KEEL_CODE_CACHE") or os.path.join(tempfile.gettempdir(), "keel-code-%d" % os.getuid())
code = os.path.join(home, digest)
for attempt in range(5):
    if os.path.isdir(code):
        break
    try:
        import fsspec
        with fsspec.open(url, "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise OSError("its checksum is wrong")
        os.makedirs(home, mode=0o700, exist_ok=True)
        part = tempfile.mkdtemp(dir=home)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(part, filter="data")
        try:
            os.rename(part, code)
        except OSError:
            shutil.rmtree(part)
    except Exception as error:
        kind = type(error).__name__
        if attempt == 4 or isinstance(error, (FileNotFoundError, PermissionError, ImportError)) or "Credentials" in kind:
            sys.exit("keel: error: %s: the code cannot be fetched (%s: %s)" % (url, kind, error))
        time.sleep(2 ** attempt)
if os.stat(home).st_uid != os.getuid():
    sys.exit("keel: error: %s belongs to somebody else; set KEEL_CODE_CACHE" % home)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
os.execv(sys.executable, [sys.executable, "-P", "-m", "cluster.launch.node", *args])
' s3://bucket/code/ab12.tar.gz ab12 --run s3://bucket/runs/fno --nodes 1 --processes 8 --restarts 3 --heartbeat 10 --grace 300 -- trainer fit s3://bucket/runs/fno &
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
