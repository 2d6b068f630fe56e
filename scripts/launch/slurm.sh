#!/usr/bin/env bash
# One run on several GPU nodes, which Slurm starts again until it is trained.
#
#     sbatch --nodes=4 scripts/launch/slurm.sh --config.batch_size=4096
#
# Submit it from a folder that all nodes share: the run lives there, in runs/. What
# follows the script's name goes to `python -m mlp_mixer.train`. Each node runs one
# process with all GPUs of the node. Before the time limit the run saves and ends with
# 75; the job then goes back into the queue under the same number, and its next start
# goes on from there. Its end with 0 (trained) or 1 (an error) is the job's end. Asked
# by `scancel JOB` the run saves too, and is not started again.
#
#   CONFIG      the recipe
#   DATA_DIR    folder of data sets, on each node or shared; TFDS's own if not set
#   VENV        virtual environment with this project, shared by the nodes
#   STOP_AFTER  time after which a start saves and ends, e.g. 3h50m; 10 minutes before
#               the job's time limit if not set
#
#SBATCH --job-name=mlp_mixer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.txt
set -euo pipefail

CONFIG=${CONFIG:-configs/mixer_b16.py}
VENV=${VENV:-.venv}
if [ -z "${STOP_AFTER:-}" ]; then
  STOP_AFTER=$((${SLURM_JOB_END_TIME:?is not set by this Slurm; set STOP_AFTER=3h50m} - $(date +%s) - 600))s
fi

# Under Slurm JAX gives a process one GPU, unless it is told otherwise.
last=$((${SLURM_GPUS_ON_NODE:-8} - 1))
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 "$last")
export JAX_LOCAL_DEVICE_IDS

# srun does not take the job's number of cores over. Processes that lose another one end
# by themselves; srun must not kill those that are about to end with 75.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  --kill-on-bad-exit=0 "$VENV/bin/python" -m mlp_mixer.train \
  --config="$CONFIG" ${DATA_DIR:+--data_dir="$DATA_DIR"} \
  --distributed=auto --stop_after="$STOP_AFTER" "$@" &
step=$!
# This shell gets a signal if somebody ends the job, or Slurm, which then requeues it by
# itself if it is to. srun passes the signal on to its tasks.
ended=
trap 'ended=yes; kill -TERM "$step"' TERM

status=0
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do # a signal has interrupted the wait
  status=0
  wait "$step" || status=$?
done

if [ "$status" -eq 75 ] && [ -z "$ended" ]; then
  echo "Steps are left: job $SLURM_JOB_ID goes back into the queue."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
