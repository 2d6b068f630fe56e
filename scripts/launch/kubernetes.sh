#!/usr/bin/env bash
# Prints a Kubernetes job, several pods of one run, and the service by which they meet.
#
#     IMAGE=registry/mlp_mixer HOSTS=4 scripts/launch/kubernetes.sh | kubectl apply -f -
#
# What follows the script's name goes to `python -m mlp_mixer.train`. A pod that ends
# with 75 (steps are left), or that is evicted or preempted, is started again and does
# not count as failed. The others that lose it end with 1 and are started again too, but
# that counts: RETRIES times per pod. It needs Kubernetes 1.33 or newer.
#
#   IMAGE       container image with this project in its Python
#   NAME        name of job, service and run
#   HOSTS       number of pods
#   GPUS        number of GPUs of each pod
#   CONFIG      the recipe
#   CLAIM       PersistentVolumeClaim that all pods may write (ReadWriteMany); /shared
#   WORKDIR     folder of the run
#   DATA_DIR    folder of data sets
#   STOP_AFTER  time after which a start saves and ends with 75, to be started anew
#   RETRIES     number of failures of each pod after which the job has failed
set -euo pipefail

IMAGE=${IMAGE:?is needed: a container image with this project}
NAME=${NAME:-mixer}
HOSTS=${HOSTS:-2}
CLAIM=${CLAIM:-shared}

arguments=""
for argument; do arguments+=" $(printf '%q' "$argument")"; done

cat << YAML
apiVersion: v1
kind: Service
metadata:
  name: $NAME
spec:
  clusterIP: None # names for the pods, no address of its own
  publishNotReadyAddresses: true # the pods meet before any of them is ready
  selector:
    batch.kubernetes.io/job-name: $NAME
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $NAME
spec:
  completionMode: Indexed
  completions: $HOSTS
  parallelism: $HOSTS
  backoffLimitPerIndex: ${RETRIES:-10}
  maxFailedIndexes: 0
  podFailurePolicy:
    rules:
      - action: Ignore
        onExitCodes:
          containerName: train
          operator: In
          values: [75]
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
  template:
    spec:
      restartPolicy: Never
      subdomain: $NAME # with the service: pod 0 is $NAME-0.$NAME
      terminationGracePeriodSeconds: 300 # from SIGTERM until the save is complete
      containers:
        - name: train
          image: $IMAGE
          command: [bash, -c]
          args:
            - >-
              exec python -m mlp_mixer.train
              --config=${CONFIG:-configs/mixer_b16.py}
              --workdir=${WORKDIR:-/shared/runs/$NAME}
              --data_dir=${DATA_DIR:-/shared/data}
              --stop_after=${STOP_AFTER:-1d}
              --distributed=$NAME-0.$NAME:1234,\$JOB_COMPLETION_INDEX,$HOSTS$arguments
          ports:
            - containerPort: 1234
          resources:
            limits:
              nvidia.com/gpu: ${GPUS:-8}
          volumeMounts:
            - name: shared
              mountPath: /shared
            - name: memory
              mountPath: /dev/shm
      volumes:
        - name: shared
          persistentVolumeClaim:
            claimName: $CLAIM
        - name: memory # for batches that processes hand to one another
          emptyDir:
            medium: Memory
YAML
