"""The scripts that start pods do what they say, as far as one machine can tell."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from fake_slurm import FakeSlurm, kill_all
from set_up import assert_equal_runs

from mlp_mixer import goodput, metrics, workdir

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    places = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=places)
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


# --- Slurm ----------------------------------------------------------------------------

RUN = [
    "--config.mesh.data=-1",
    "--config.total_steps=40",
    "--config.optim.warmup_steps=4",
    "--config.log_every_steps=1",
    "--config.evals.test.every_steps=20",
    "--config.checkpoint.every_steps=10",
]


@pytest.fixture
def slurm(tmp_path, data_dir, root):
    """start(workdir, stop_after, …): a job of two tasks; and the fake that runs it."""
    fake = FakeSlurm(tmp_path / "slurm", tasks=2)
    started = []

    def start(folder, stop_after, *arguments):
        job = fake.start(
            LAUNCH / "slurm.sh",
            *RUN,
            f"--workdir={folder}",
            *arguments,
            cwd=root,
            CONFIG="configs/digits.py",
            DATA_DIR=data_dir,
            STOP_AFTER=stop_after,
        )
        started.append(job)
        return job

    yield start, fake
    for job in started:
        with contextlib.suppress(ProcessLookupError):
            kill_all(job)
        job.communicate()


@pytest.mark.slow
def test_a_job_is_requeued_until_it_is_trained_and_ends_as_the_uninterrupted_one(
    slurm, tmp_path
):
    start, fake = slurm
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = start(whole, "1h")
    output, _ = job.communicate(timeout=300)
    assert (job.returncode, fake.requeued()) == (0, 0), output
    # Over before the first step, so each start does one at least.
    seconds = 0.0
    for starts, (stop_after, status) in enumerate([("1s", 75), ("1s", 75), ("1h", 0)]):
        assert fake.requeued() == starts
        began = time.monotonic()
        job = start(parts, stop_after)
        output, _ = job.communicate(timeout=300)
        seconds += time.monotonic() - began
        assert job.returncode == status, output
    assert fake.requeued() == 2
    assert_equal_runs(workdir.load(whole), whole, parts)
    spent = goodput.sums(metrics.read(parts))
    spent.pop("not_running")
    # No record can tell how long a process takes to end.
    assert 0.98 * (seconds - 3 * 3) < sum(spent.values()) < 1.02 * seconds


@pytest.mark.slow
def test_a_job_that_somebody_ends_has_saved_and_is_not_requeued(slurm, tmp_path):
    start, fake = slurm
    run = tmp_path / "run"
    job = start(run, "1h", "--config.total_steps=100_000")
    while not metrics.read(run):
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.1)
    job.terminate()
    output, _ = job.communicate(timeout=120)
    assert (job.returncode, fake.requeued()) == (75, 0), output
    saved = int(max(os.listdir(run / "checkpoints")))
    assert saved == metrics.read(run)[-1]["step"] > 0, output


def test_a_job_that_fails_is_not_requeued(tmp_path, root):
    fake = FakeSlurm(tmp_path, tasks=1)
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho "$@"\nexit "$STATUS"\n')
    for status, requeued in (("1", 0), ("137", 0), ("0", 0), ("75", 1)):
        job = fake.start(
            LAUNCH / "slurm.sh",
            "--config.seed=3",
            cwd=root,
            STATUS=status,
            SLURM_GPUS_ON_NODE="8",
            SLURM_JOB_END_TIME=str(int(time.time()) + 4 * 3600),
        )
        output, _ = job.communicate(timeout=60)
        assert job.returncode == int(status), output
        assert fake.requeued() == requeued
    command = output.splitlines()[0]
    assert "--config=configs/mixer_b16.py --distributed=auto" in command
    assert command.endswith("--config.seed=3")
    seconds = int(command.partition("--stop_after=")[2].partition("s ")[0])
    assert 13700 < seconds <= 13800  # ten minutes less than four hours


# --- Kubernetes -----------------------------------------------------------------------


def test_the_pods_of_a_kubernetes_job_find_one_another_and_are_started_again():
    printed = subprocess.run(
        ["bash", LAUNCH / "kubernetes.sh", "--config.seed=3", "--config.words=a b"],
        env=os.environ | {"IMAGE": "registry/mixer:1", "NAME": "b16", "HOSTS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    service, job = yaml.safe_load_all(printed.stdout)
    kinds = [(part["apiVersion"], part["kind"]) for part in (service, job)]
    assert kinds == [("v1", "Service"), ("batch/v1", "Job")]
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    label = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["selector"] == label
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    container = pod["containers"][0]
    stopped, evicted = spec["podFailurePolicy"]["rules"]
    assert stopped["action"] == evicted["action"] == "Ignore"
    assert stopped["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert evicted["onPodConditions"] == [
        {"type": "DisruptionTarget", "status": "True"}
    ]
    assert pod["subdomain"] == name
    # What the shell of pod 2 starts, with python in its place.
    assert container["command"] == ["bash", "-c"]
    (line,) = container["args"]
    echoed = subprocess.run(
        ["bash", "-c", line.replace("exec python", "exec printf '%s\\n'")],
        env={"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = echoed.stdout.splitlines()
    address = f"{job['metadata']['name']}-0.{name}:1234"
    assert f"--distributed={address},2,4" in words
    assert words[-2:] == ["--config.seed=3", "--config.words=a b"]
    assert {m["name"] for m in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }


# --- TPU pods -------------------------------------------------------------------------

GCLOUD = """#!/bin/bash
# A cloud of two hosts: folders. What runs there is as scripted in $CLOUD/train.
echo "$*" >> "$CLOUD/calls"
shift 2
case "$1 $2" in
  "queued-resources create") echo ACTIVE > "$CLOUD/state" ;;
  "queued-resources delete") rm "$CLOUD/state"
    mkdir "$CLOUD/gone_$$"; mv "$CLOUD"/host_? "$CLOUD/gone_$$" ;;
  "queued-resources describe") cat "$CLOUD/state" ;;
  "tpu-vm scp") mkdir -p "$CLOUD"/host_{0,1}; for i in 0 1; do
    cp "$3" "$CLOUD/host_$i"; done ;;
  "tpu-vm ssh")
    for word; do case $word in
      --worker=all) hosts="0 1" ;;
      --worker=*) hosts=${word#--worker=} ;;
      --command=*) command=${word#--command=} ;;
    esac; done
    for i in $hosts; do
      mkdir -p "$CLOUD/host_$i"
      (cd "$CLOUD/host_$i" && HOME=$PWD PATH=$CLOUD/host_bin:$PATH bash -c "$command")
    done ;;
esac
"""
# Installs a "python" that ends as the next line of $CLOUD/statuses says.
HOST_PYTHON = """#!/bin/bash
mkdir -p ~/.local/bin
cat > ~/.local/bin/uv << 'UV'
#!/bin/bash
[ "$1" = venv ] || { echo "$*" >> "$CLOUD/installed"; exit; }
mkdir -p .venv/bin
cat > .venv/bin/python << 'PYTHON'
#!/bin/bash
echo "$*" >> "$CLOUD/trained"
lines=$(wc -l < "$CLOUD/trained")
what=$(sed -n "$(((lines + 1) / 2))p" "$CLOUD/statuses")
[ "$what" = preempted ] && { echo SUSPENDED > "$CLOUD/state"; exec sleep 0.3; }
[ "$what" = wait ] && exec sleep 60
exit "$what"
PYTHON
chmod +x .venv/bin/python
UV
chmod +x ~/.local/bin/uv
"""


@pytest.fixture
def cloud(tmp_path):
    """cloud(statuses, *arguments): runs tpu_pod.sh where trainings end like that."""
    for place, text in (("bin/gcloud", GCLOUD), ("host_bin/python3", HOST_PYTHON)):
        path = tmp_path / place
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)

    def run(statuses, *arguments):
        (tmp_path / "statuses").write_text("".join(f"{s}\n" for s in statuses))
        return subprocess.run(
            ["bash", LAUNCH / "tpu_pod.sh", *arguments],
            env=os.environ
            | {
                "CLOUD": str(tmp_path),
                "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
                "TPU": "pod",
                "ZONE": "zone",
                "TYPE": "v5litepod-16",
                "VERSION": "v2-alpha-tpuv5-lite",
                "WORKDIR": "gs://bucket/run",
                "POLL": "0.1",
                "RETRIES": "1",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statuses", "pods", "returncode"),
    [
        ([0], 1, 0),
        ([75, "preempted", 1, 0], 2, 0),
        ([1, 1, 0], 1, 1),  # fails more often than RETRIES
    ],
)
def test_a_tpu_pod_is_kept_until_the_run_is_trained(
    statuses, pods, returncode, cloud, tmp_path
):
    done = cloud(statuses, "keep", "--config.words=a b")
    assert done.returncode == returncode, done.stderr
    calls = "\n".join(lines_of(tmp_path / "calls"))
    for verb in ("create", "delete"):
        assert calls.count(f"queued-resources {verb} pod --zone=zone") == pods
    assert not (tmp_path / "state").exists()  # nothing is left that costs
    trained = lines_of(tmp_path / "trained")
    assert len(trained) == 2 * min(len(statuses), 2 if returncode else 9)
    assert set(trained) == {
        "-m mlp_mixer.train --config=configs/mixer_b16.py --workdir=gs://bucket/run"
        " --stop_after=30d --distributed=auto --config.words=a b"
    }


@pytest.mark.slow
def test_each_step_of_a_tpu_pod_alone(cloud, tmp_path):
    for step in ("create", "install", "train"):
        assert cloud(["wait"], step).returncode == 0
    assert (tmp_path / "host_1/mlp_mixer/mlp_mixer/train.py").exists()
    for _ in range(50):
        if len(lines_of(tmp_path / "trained")) == 2:
            break
        time.sleep(0.1)
    assert cloud(["wait"], "status").stdout.splitlines() == ["train: running"] * 2
    assert cloud(["wait"], "stop").returncode == 0
    time.sleep(0.5)
    assert cloud(["wait"], "status").stdout.splitlines() == ["train: 143"] * 2
    assert cloud(["wait"], "delete").returncode == 0
    assert cloud(["wait"], "wokr").returncode == 2
