#!/bin/bash
#SBATCH --job-name=tickets-3fa2c1d4-04-train
#SBATCH --comment=toolkit:tickets-3fa2c1d4-04-train
#SBATCH --output=slurm.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@90
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=65536M
#SBATCH --gres=gpu:h100:1
#SBATCH --time=1-01:01:01
#SBATCH --partition=gpu,long
#SBATCH --account=ml
#SBATCH --qos=high
#SBATCH --constraint=h100&ib
#SBATCH --exclusive
#SBATCH --dependency=afterok:17
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=END,FAIL
#SBATCH --comment-like="a \"b\" #c\\"
#SBATCH --overcommit

trap : USR1 # until there is somebody to hear it
cd -- '/home/ada/my work/jobs/tickets-3fa2c1d4/tickets-3fa2c1d4-04-train' || exit
ended() { # the last word of the script, kept for those who ask after Slurm forgot
  local rc="${1:-$?}"
  local form='{"job": "%s", "mark": "%s", "restarts": %d, "exit_code": %d}\n'
  local mark=toolkit:tickets-3fa2c1d4-04-train restarts="${SLURM_RESTART_COUNT:-0}"
  printf "$form" "$SLURM_JOB_ID" "$mark" "$restarts" "$rc" >.slurm.part
  mv .slurm.part slurm.json
  exit "$rc"
}
type module >/dev/null 2>&1 || . /etc/profile
module purge
module load cuda/13.0 || ended 3
module load python/3.12 || ended 3
ulimit -n 65536
rc=$?; ((rc == 0)) || ended "$rc"
export NOTE=$'it\'s $5\n"or" more'
MLFLOW_TRACKING_TOKEN="$(cat -- /home/ada/.token)" || ended 3; export MLFLOW_TRACKING_TOKEN
export TOOLKIT_ENGINE_ID="$SLURM_JOB_ID@tickets-3fa2c1d4-04-train"
export TOOLKIT_START="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
program=(
  /opt/tk/bin/python
  -P
  -m
  toolkit.launch.shim
  '/home/ada/my work/jobs'
)
trap 'kill -USR1 "$child" 2>/dev/null' USR1 TERM
"${program[@]}" &
child=$!
wait "$child"
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # signals end wait, not the program
wait "$child"
rc=$?
trap '' USR1 TERM
watcher="$(awk '/^PPid:/ {print $2}' /proc/$$/status)"
alone=$((watcher != PPID)) again=0
case $rc in
  75 | 4 | 137 | 138 | 143) again=1 ;;
  0) again=$alone ;; # done: the next start ends at once
esac
if ((again || alone)) && [[ ! -e cancelled.json ]] &&
  [[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" == RUNNING ]]; then
  if ((again)); then scontrol requeue "$SLURM_JOB_ID"; else scancel "$SLURM_JOB_ID"; fi
fi
ended "$rc"
