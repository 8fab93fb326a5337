#!/bin/bash
#SBATCH --job-name=array-a66a0c85-02-train
#SBATCH --comment=toolkit:array-a66a0c85-02-train
#SBATCH --array=0-2%2
#SBATCH --output=/dev/null
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@90
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=65536M
#SBATCH --gres=gpu:1
#SBATCH --time=1-01:01:01
#SBATCH --dependency=aftercorr:17
#SBATCH --kill-on-invalid-dep=yes

trap : USR1 # until there is somebody to hear it
toolkit_task="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
case "$SLURM_ARRAY_TASK_ID" in
0)
  toolkit_job=tickets-00000000-02-train toolkit_mark=toolkit:tickets-00000000-02-train
  toolkit_folder='/home/ada/my work/jobs/tickets-00000000/tickets-00000000-02-train'
  toolkit_after=(
    '/home/ada/my work/jobs/tickets-00000000/tickets-00000000-01-data'
  )
  toolkit_program=(
    /opt/tk/bin/python
    -P
    -m
    toolkit.launch.shim
    '/home/ada/my work/jobs/tickets-00000000/tickets-00000000-02-train'
  )
  ;;
1)
  toolkit_job=tickets-00000001-02-train toolkit_mark=toolkit:tickets-00000001-02-train
  toolkit_folder='/home/ada/my work/jobs/tickets-00000001/tickets-00000001-02-train'
  toolkit_after=(
    '/home/ada/my work/jobs/tickets-00000001/tickets-00000001-01-data'
  )
  toolkit_program=(
    /opt/tk/bin/python
    -P
    -m
    toolkit.launch.shim
    '/home/ada/my work/jobs/tickets-00000001/tickets-00000001-02-train'
  )
  ;;
2)
  toolkit_job=tickets-00000002-02-train toolkit_mark=toolkit:tickets-00000002-02-train
  toolkit_folder='/home/ada/my work/jobs/tickets-00000002/tickets-00000002-02-train'
  toolkit_after=(
    '/home/ada/my work/jobs/tickets-00000002/tickets-00000002-01-data'
  )
  toolkit_program=(
    /opt/tk/bin/python
    -P
    -m
    toolkit.launch.shim
    '/home/ada/my work/jobs/tickets-00000002/tickets-00000002-02-train'
  )
  ;;
esac
cd -- "$toolkit_folder" || exit
exec >>slurm.txt 2>&1
ended() { # the last word of the script, kept for those who ask after Slurm forgot
  local rc="${1:-$?}"
  local form='{"job": "%s", "mark": "%s", "restarts": %d, "exit_code": %d}\n'
  local mark="$toolkit_mark" restarts="${SLURM_RESTART_COUNT:-0}"
  printf "$form" "$toolkit_task" "$mark" "$restarts" "$rc" >.slurm.part
  mv .slurm.part slurm.json
  exit "$rc"
}
export NOTE=$'it\'s $5\n"or" more'
export TOOLKIT_ENGINE_ID="$toolkit_task@$toolkit_job"
export TOOLKIT_START="$toolkit_task.${SLURM_RESTART_COUNT:-0}"
for place in "${toolkit_after[@]}"; do
  grep -qs '"exit_code": 0}' "$place/slurm.json" && continue
  echo "${place##*/} did not succeed"; ended 1
done
program=("${toolkit_program[@]}")
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
  [[ "$(squeue -h -j "$toolkit_task" -o %T)" == RUNNING ]]; then
  if ((again)); then scontrol requeue "$toolkit_task"; else scancel "$toolkit_task"; fi
fi
ended "$rc"
