#!/usr/bin/env bash
# One run on a slice of a Cloud TPU pod, with the newest commit of this clone.
#
#     export TPU=mixer ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite
#     export WORKDIR=gs://bucket/runs/mixer_b16 DATA_DIR=/mnt/bucket/data
#     scripts/launch/tpu_pod.sh create      # waits for the chips; they cost from now on
#     scripts/launch/tpu_pod.sh install     # this commit, on all hosts
#     scripts/launch/tpu_pod.sh train --config.seed=1   # goes on without this machine
#     scripts/launch/tpu_pod.sh logs        # of host 0, until Ctrl-C
#     scripts/launch/tpu_pod.sh status      # of each host: running, or its exit status
#     scripts/launch/tpu_pod.sh stop        # the run saves and ends; train resumes it
#     scripts/launch/tpu_pod.sh delete      # the end of the costs
#
#     scripts/launch/tpu_pod.sh keep --config.seed=1    # all of it until it is trained
#
# `keep` creates, installs and trains, and does so again after a preemption or a stop; it
# deletes the chips at the end, also if the run has failed more than RETRIES times.
#
#   TPU, ZONE   name and place of the slice
#   TYPE        accelerator type, see `gcloud compute tpus accelerator-types list`
#   VERSION     runtime, see `gcloud compute tpus tpu-vm versions list`
#   SPOT        if set: cheaper, may be preempted
#   CONFIG      the recipe
#   WORKDIR     folder of the run, on a bucket: a host's disk goes with the host
#   DATA_DIR    folder of data sets on each host; TFDS's own if not set
#   PREPARE     a command that each host runs after the installation, e.g. a mount
#   RETRIES     number of failures that `keep` answers with another start
#   POLL        seconds between two looks of `create` and `keep`
#
# shellcheck disable=SC2016  # what is in single quotes is for the hosts' shells
set -euo pipefail
cd "$(dirname "$0")/../.."

TPU=${TPU:-mixer}
ZONE=${ZONE:?is needed, e.g. us-west4-a}
CONFIG=${CONFIG:-configs/mixer_b16.py}
POLL=${POLL:-60}

queued() { gcloud compute tpus queued-resources "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
on() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"; }
state() { queued describe --format='value(state.state)' 2> /dev/null || true; }

create() {
  queued create --node-id="$TPU" --accelerator-type="${TYPE:?is needed, e.g. v5litepod-256}" \
    --runtime-version="${VERSION:?is needed, e.g. v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED | SUSPENDED) echo "The slice is $(state)." >&2 && return 1 ;;
    esac
    sleep "$POLL"
  done
}

install() {
  local archive
  archive=$(mktemp -d)/mlp_mixer.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$TPU": --zone="$ZONE" --worker=all
  # The hosts' own Python may be older than 3.11.
  on all 'mkdir -p mlp_mixer && tar -xzf mlp_mixer.tar.gz -C mlp_mixer && cd mlp_mixer &&
    python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --allow-existing --python=3.12 &&
    ~/.local/bin/uv pip install --quiet --constraint constraints.txt --editable ".[tpu,gcs]"'
  on all "${PREPARE:-true}"
}

train() {
  local command process
  command="--config=$CONFIG --workdir=${WORKDIR:?is needed, e.g. gs://bucket/runs/b16}"
  # With --stop_after a start that leaves steps ends with 75, so that `keep` can tell.
  command+=" ${DATA_DIR:+--data_dir=$DATA_DIR} --stop_after=30d --distributed=auto"
  for argument; do command+=" $(printf '%q' "$argument")"; done
  process="cd mlp_mixer; rm -f ~/train.status
    .venv/bin/python -m mlp_mixer.train $command >> ~/train.txt 2>&1 &
    echo \$! > ~/train.pid; wait \$!; echo \$? > ~/train.status"
  # Without a terminal it goes on when this connection ends.
  on all "nohup bash -c $(printf '%q' "$process") < /dev/null > /dev/null 2>&1 &"
}

logs() { on 0 'tail -n 50 -F train.txt'; }

status() {
  on all 'if kill -0 "$(cat train.pid)"; then echo train: running
    else echo train: "$(cat train.status || echo gone)"; fi 2> /dev/null'
}

stop() { on all 'kill -TERM "$(cat train.pid)"'; }

delete() { queued delete --force --quiet; }

keep() {
  local failures=0 found
  while true; do
    case $(state) in
      ACTIVE)
        found=$(status | grep -o 'train: .*' | sort -u || true)
        case $found in
          *running* | '') sleep "$POLL" && continue ;; # '': it cannot be asked now
          'train: 0') break ;;
          *gone*) install && train "$@" ;;
          *75*) train "$@" ;;
          *)
            failures=$((failures + 1))
            [ "$failures" -le "${RETRIES:-10}" ] || break
            train "$@"
            ;;
        esac
        ;;
      '') create && install && train "$@" ;; # if that fails: once more
      FAILED | SUSPENDED) delete ;; # preempted
    esac
    sleep "$POLL"
  done
  delete
  [ "$found" = 'train: 0' ]
}

case ${1:-} in
  create | install | train | logs | status | stop | delete | keep) "$@" ;;
  *) echo "usage: $0 create|install|train|logs|status|stop|delete|keep" >&2 && exit 2 ;;
esac
