"""The parent of one of several processes: what it passes on, explains and hands on."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from mlp_mixer import supervisor

# As jaxlib 0.10.2 prints them; the middle of the stack trace is left out.
_AGENT = (
    "E1127 03:16:12.410249   22851 coordination_service_agent.cc:289] Polled an error "
    "from coordination service (this can be an error from this or another task).\n"
)
_FATAL = (
    "F1127 03:16:12.410376   22851 client.h:80] Terminating process because the JAX "
    "distributed service detected fatal errors. This most likely indicates that "
    "another task died; see the other task logs for more details. Disable Python "
    "buffering, i.e. `python -u`, to be sure to see all the previous output. "
    "absl::Status: "
)


def _unhealthy(*tasks):
    lines = "".join(f"{task}\n" for task in tasks)
    return (
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
        f"{lines}The tasks have crashed. Check the task logs for an earlier error, or "
        "scheduler events (e.g. preemption, eviction) to debug further."
    )


_TRACE = (
    "*** Check failure stack trace: ***\n"
    "    @     0x7f8e1a240634  absl::lts_20260107::log_internal::LogMessage::Flush()\n"
    "    @     0x7f8e218a71f5  (unknown)\n"
)
# What the other processes print when one is killed, stopped, or is process 0.
PAGES = {
    "process 0 when another is lost": (
        "E1127 03:16:12.409722   22840 coordination_service.cc:1549] [11692832735266] "
        "Use error polling to propagate the following error to all tasks: "
        f"{_unhealthy(1)} [type.googleapis.com/tensorflow.Coordination='']\n"
        f"{_AGENT}{_FATAL}{_unhealthy(1)}\n\n"
        "RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/"
        f"tensorflow.CoordinationServiceError='']\n{_TRACE}",
        "Process 1 on b stopped answering",
    ),
    "two are lost": (
        f"{_AGENT}{_FATAL}{_unhealthy(1, 2)}\n\n{_TRACE}",
        "Process 1 on b and process 2 on c stopped answering",
    ),
    "another form of their names": (
        f"{_FATAL}{_unhealthy('/job:jax_worker/replica:0/task:2')}\n{_TRACE}",
        "Process 2 on c stopped answering",
    ),
    "process 0 is killed": (
        "W1127 03:17:56.681099   27321 preemption_sync_manager.cc:147] Failed to "
        "retrieve preemption notice from coordination service: UNAVAILABLE: Socket "
        "closed\nAdditional GRPC error information from remote target "
        f"coordination_service while calling /xla.coordination/GetKeyValue:\n{_AGENT}"
        f"{_FATAL}UNAVAILABLE: Failed to send RPC to coordination service. Either the "
        "leader task was preempted/died/restarted unexpectedly or this task is "
        "experiencing network issues.\nAdditional GRPC error information from remote "
        "target coordination_service while calling /xla.coordination."
        f"CoordinationService/PollForError:\n{_TRACE}",
        "Process 0 on a has ended, or cannot be reached",
    ),
    "process 0 is stopped": (
        f"{_FATAL}DEADLINE_EXCEEDED: Deadline Exceeded\n\n"
        f"RPC: /xla.coordination.CoordinationService/Heartbeat\n{_TRACE}",
        "Process 0 on a stopped answering",
    ),
}


@pytest.mark.parametrize("cut", [1, 7, 100, 100_000])
@pytest.mark.parametrize(("text", "lost"), PAGES.values(), ids=PAGES)
def test_the_page_of_jax_becomes_the_names_of_who_is_lost(text, lost, cut):
    page = supervisor.OutputFilter()
    data = f"03:16:11 step 5/900\nEvery word\n{text}".encode()
    shown = b"".join(
        page.passed(data[i : i + cut]) + page.released()
        for i in range(0, len(data), cut)
    )
    assert shown == b"03:16:11 step 5/900\nEvery word\n"
    assert page.lost(["a", "b", "c"]) == lost
    assert page.lost([]) == lost.replace(" on a", "").replace(" on b", "").replace(
        " on c", ""
    )


def test_a_page_that_nothing_comes_before_is_held_too():
    page = supervisor.OutputFilter()
    assert page.released() == b""
    assert page.passed(_AGENT.encode()) == b""


@pytest.mark.parametrize(
    "text",
    [
        f"{_FATAL}INTERNAL: something that is new\n{_TRACE}",
        "F1127 03:16:12.410376   22851 pjrt_client.cc:80] Check failed: n == 3\n",
        "Fatal Python error: Segmentation fault\n",
    ],
)
def test_an_end_that_is_not_known_keeps_its_text(text):
    page = supervisor.OutputFilter()
    shown = page.passed(text.encode())
    assert page.lost(["a", "b"]) is None
    assert shown + page.held == text.encode()


def test_a_line_of_jax_that_no_end_follows_is_shown_after_a_while(monkeypatch):
    monkeypatch.setattr(supervisor, "_PATIENCE", 0.1)
    page = supervisor.OutputFilter()
    shown = page.passed(b"one\n" + _AGENT.encode()) + page.released()
    assert shown == b"one\n"
    time.sleep(0.11)
    # Also while others follow.
    shown = page.passed(b"two\n") + page.released()
    assert shown == _AGENT.encode() + b"two\n"


def test_a_line_without_an_end_is_shown_at_once():
    page = supervisor.OutputFilter()
    for text in (b"step 1/9 \r", b"\x1b[2KE", b"Wait", b"\xff\x00", b" for W"):
        assert page.passed(text) == text
    assert page.passed(b"\nW") == b"\n"
    assert page.passed(b"aiting") == b"Waiting"


# --- Real processes, without JAX ------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
from mlp_mixer import supervisor
supervisor._SAME_SIGNAL = 0.3
supervisor.supervise(saves={saves})

def tell(*words):
    print(*words, file=sys.stderr, flush=True)

{child}
"""


@pytest.fixture
def start(root):
    """start(child, saves=True): the parent of a process that runs this text."""
    started = []

    def begin(child, *, saves=True, distributed=True, **options):
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM.format(saves=saves, child=child)),
                *["--distributed=x"] * distributed,
            ],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **options,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process):
    """Status, stdout and stderr."""
    out, said = process.communicate(timeout=20)
    return process.returncode, out, said.decode()


@pytest.mark.parametrize("status", [0, 1, 75])
def test_output_and_status_are_those_of_the_child(start, status):
    data = rb"b'a\xff\x00\n' * 50_000"
    child = (
        f"os.write(2, {data.decode()}); os.write(1, b'out'); "
        f"tell(sys.argv); sys.exit({status})"
    )
    process = start(child)
    out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (status, b"out")
    assert said == b"a\xff\x00\n" * 50_000 + b"['-c', '--distributed=x']\n"


def test_one_process_alone_has_no_parent(start):
    child = "tell(os.getpid(), supervisor.process_id()); supervisor.take_signals()"
    process = start(child, distributed=False)
    assert ended(process) == (0, b"", f"{process.pid} {process.pid}\n")


@pytest.mark.parametrize("words", [["--distributed=x"], ["-distributed", "auto"]])
def test_only_a_program_that_can_be_started_again_gets_a_parent(words, monkeypatch):
    """A test that runs it in its own process would start itself again for ever."""
    assert not supervisor._is_one_of_several(words)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train", *words])
    assert supervisor._is_one_of_several(words)
    assert not supervisor._is_one_of_several([])


def test_a_child_that_lost_another_ends_with_one_line_and_status_1(start):
    text, lost = PAGES["process 0 when another is lost"]
    child = f"""
supervisor.hosts_known(0, ["a", "b"])
tell("before")
os.write(2, {text!r}.encode())
os.abort()
"""
    code, _, said = ended(start(child))
    assert code == 1
    assert said == (
        f"before\n{lost}, so process 0 on a ends too. Start all processes again: the "
        "run goes on from its last checkpoint.\n"
    )


def test_a_child_that_is_killed_is_named_and_its_last_words_are_kept(start):
    child = """
supervisor.hosts_known(1, ["a", "b"])
os.write(2, b"E1127 03:16:12.4   228 coordination_service.cc:1] a warning")
os.kill(os.getpid(), signal.SIGKILL)
"""
    code, _, said = ended(start(child))
    assert code == 137
    assert "a warning" in said
    assert said.endswith("Process 1 on b was killed by SIGKILL.\n")


HOLDS = """
tell("importing")
time.sleep(0.1)
heard = []
signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
tell("joining")
time.sleep(0.1)
before = list(heard)
supervisor.take_signals()
while not heard:
    time.sleep(0.01)
time.sleep({seconds})
tell(before, heard, supervisor.signals_received())
"""


@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_until_the_child_can_take_it(start, signum, whole_group):
    """A terminal's Ctrl-C and some queues reach the child too: it is one signal."""
    process = start(HOLDS.format(seconds=0))
    assert process.stderr.readline() == b"importing\n"
    (os.killpg if whole_group else os.kill)(process.pid, signum)
    code, _, said = ended(process)
    assert code == 0
    name = signum.name
    told = f"{name} received: all processes save and stop; again to stop now\n"
    assert said in (f"{told}joining\n[] [15] ['{name}']\n",)


def test_the_second_signal_ends_the_child_now_but_not_the_same_one_twice(start):
    process = start(HOLDS.format(seconds=60))
    assert process.stderr.readline() == b"importing\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM


def test_a_program_that_saves_nothing_ends_at_the_first_signal(start):
    process = start("tell('begun'); time.sleep(60)", saves=False)
    assert process.stderr.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM


def test_a_child_does_not_outlive_its_parent(start):
    process = start("tell(os.getpid()); time.sleep(60)")
    child = int(process.stderr.readline())
    process.kill()
    until = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and time.monotonic() < until:
        with open(f"/proc/{child}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                break
        time.sleep(0.01)
    else:
        assert not os.path.exists(f"/proc/{child}")


def test_a_child_of_a_terminal_has_one(root):
    child = "tell(os.isatty(2), os.get_terminal_size(2).columns); time.sleep(0.1)"
    code = PROGRAM.format(saves=True, child=child)
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--distributed=x"], cwd=root, stderr=its_end
    )
    os.close(its_end)
    said = b""
    while b"\n" not in said:
        said += os.read(terminal, 1000)
    assert process.wait(20) == 0
    os.close(terminal)
    assert said == b"True 0\r\n"
