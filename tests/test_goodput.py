"""Every second of a run is accounted for, over all its starts."""

import functools
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from set_up import told

from mlp_mixer import goodput, metrics


class Hands:
    """A clock that a test moves; the time of day goes with it, `late` seconds apart."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        self.late = 0.0
        monkeypatch.setattr(time, "time", lambda: self.now + self.late)

    def __call__(self):
        return self.now

    def turn(self, seconds):
        self.now += seconds


@pytest.fixture
def hands(monkeypatch):
    return Hands(monkeypatch)


class Result:
    """What a step computes; it is there when a test says so."""

    def __init__(self):
        self.event = threading.Event()
        self.is_ready = self.event.is_set

    def block_until_ready(self):
        self.event.wait(10)


def scalars():
    return {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(1.0)}


def writer(workdir, clock, first_step=0, total_steps=100):
    return metrics.Writer(
        workdir,
        first_step=first_step,
        total_steps=total_steps,
        batch_size=8,
        every_steps=4,
        learning_rate=lambda update: 0.1,
        last_good=lambda: None,
        clock=clock,
    )


def train(w, clock, hands, steps):
    """Each step waits 1 s for input, computes 2 s and then leaves 0.5 s."""
    for step in steps:
        with clock.doing("input"):
            hands.turn(1)
        with clock.doing("steps"):
            hands.turn(2)
        hands.turn(0.5)
        w.train(step, scalars())


def test_the_kinds_of_three_starts_add_up_to_what_the_starts_took(
    tmp_path, hands, monkeypatch
):
    monkeypatch.setattr(goodput.Clock, "step_began", lambda *_: None)  # no device
    workdir = tmp_path / "run"
    # The first start: 20 s of start-up, step 10 is saved, killed after step 15.
    clock = goodput.Clock(5.0, now=hands)
    hands.turn(15)
    w = writer(workdir, clock)
    train(w, clock, hands, range(1, 11))
    with clock.doing("evaluation"):
        hands.turn(30)
    w.flush()
    w.evaluation(10, "val", {"top1": 0.5})
    with clock.doing("checkpoint"):
        hands.turn(7)
    train(w, clock, hands, range(11, 16))
    w._file.close()  # record 12 was written after step 13; the last two went by
    w._board.close()
    killed = 20 + 15 * 3.5 + 30 + 7
    hands.turn(100)

    # The second start goes on after step 10, evaluates after 12, is stopped after 13.
    clock = goodput.Clock(now=hands)
    hands.turn(9)
    with writer(workdir, clock, first_step=10) as w:
        train(w, clock, hands, range(11, 13))
        w.flush()
        with clock.doing("evaluation"):
            hands.turn(30)
        w.evaluation(12, "val", {"top1": 0.5})
        train(w, clock, hands, range(13, 14))
        w.flush()
    stopped = 9 + 3 * 3.5 + 30
    hands.turn(1000)

    # The third finds an older checkpoint, that of step 9, and comes to the end.
    clock = goodput.Clock(now=hands)
    hands.turn(9)
    with writer(workdir, clock, first_step=9, total_steps=13) as w:
        train(w, clock, hands, range(10, 14))
        w.flush()
    last = 9 + 4 * 3.5

    records = metrics.read(workdir)
    seconds = goodput.sums(records)
    between = seconds.pop("not_running")
    # On average a kill comes half way to a record; the last one took three steps.
    assert seconds["lost"] == 3 * 3.5 / 2
    unseen = 2 * 3.5 - seconds["lost"]
    assert sum(seconds.values()) == pytest.approx(killed + stopped + last - unseen)
    assert between == pytest.approx(1100 + unseen)
    assert seconds == pytest.approx(
        {
            # Record 8 was written after step 9; half of record 10 was kept.
            "steps": (9 + 0.5 + 4) * 2,
            "input": (9 + 0.5 + 4) * 1,
            "repeated": (0.5 + 3 + 3) * 3 + 2 * 30,
            "checkpoint": 7,
            "start": 20,
            "restart": 18,
            "lost": 5.25,
            "other": (13 + 3 + 4) * 0.5,
        }
    )
    assert sum(record.get("starts", 0) for record in records) == 3
    assert sum(record.get("ends", 0) for record in records) == 2
    *_, whole, apart = goodput.rows(records)
    assert whole[0] == "all of 3 starts"
    assert apart[:2] == ["not running", goodput.duration(between)]
    assert [r["step"] for r in told(workdir)] == [4, 8, 12, 13]


def test_waiting_for_input_counts_from_the_end_of_the_step_that_computes(hands):
    clock, result = goodput.Clock(now=hands), Result()
    with clock:
        clock.started()
        for step in range(1, 4):
            with clock.doing("input"):
                hands.turn(2)  # nothing computes, the first time
                if step > 1:
                    result.event.set()
                    until = time.monotonic() + 10
                    while step > 2 and clock._noted[0] < step - 1:
                        assert time.monotonic() < until
                hands.turn(4)
            with clock.doing("steps"):
                hands.turn(0.5)
            result = Result()
            clock.step_began(result)
            hands.turn(0.25)
        # The last batch is there before the step ends, and so is a checkpoint later.
        with clock.doing("input"):
            hands.turn(2)
        with clock.doing("steps"):
            hands.turn(1)
            result.event.set()
        with clock.doing("checkpoint"):
            hands.turn(5)
    assert clock.take() == {
        "seconds/steps": 3 * (0.5 + 0.25) + 2 + 2 + 1,
        # Only then it is known that ends of steps are to be noted.
        "seconds/input": 6 + 6 + 4,
        "seconds/checkpoint": 5,
    }


def test_compilation_is_told_from_what_compiles():
    with goodput.Clock() as clock:
        clock.started()
        inner = jax.jit(lambda x: functools.reduce(jnp.matmul, [x] * 30))
        step = jax.jit(lambda x: jnp.tanh(inner(x)) + inner(2 * x))
        times = []
        for x in (jnp.ones((8, 8)),) * 2:
            began, _ = time.monotonic(), clock.take()
            with clock.doing("evaluation"):
                step(x).block_until_ready()
            times.append((clock.take(), time.monotonic() - began))
    (first, whole), (second, _) = times
    assert 0.5 * whole < first["seconds/compile"] < whole
    assert first["seconds/evaluation"] > 0
    assert sum(first.values()) == pytest.approx(whole, abs=0.02)
    assert second.keys() <= {"seconds/evaluation", "seconds/other"}


def test_what_is_traced_within_what_is_traced_counts_once(hands):
    def told(part, seconds):
        name = f"/jax/core/compile/{part}_duration"
        jax.monitoring.record_event_duration_secs(name, seconds)

    with goodput.Clock(now=hands) as clock:
        clock.started()
        with clock.doing("evaluation"):
            hands.turn(10 + 2)
            told("jaxpr_trace", 2.0)
            hands.turn(1)
            told("jaxpr_trace", 4.0)  # what it calls, and a second on either side
            hands.turn(3)
            told("backend_compile", 3.0)
        assert clock.take() == {"seconds/compile": 4 + 3, "seconds/evaluation": 9}


def test_a_time_of_day_that_goes_back_gives_no_negative_seconds(
    tmp_path, hands, monkeypatch
):
    monkeypatch.setattr(goodput.Clock, "step_began", lambda *_: None)
    for start in range(2):
        clock = goodput.Clock(now=hands)
        hands.turn(1)
        w = writer(tmp_path, clock, first_step=4 * start)
        train(w, clock, hands, range(4 * start + 1, 4 * start + 6))
        w._file.close()
        w._board.close()
        hands.late -= 1e6
    times = [r.items() for r in metrics.read(tmp_path)]
    assert min(v for pairs in times for k, v in pairs if k != "unix_time") >= 0
    assert goodput.sums(metrics.read(tmp_path))["restart"] == 1


def test_a_run_that_tells_no_times_has_no_table():
    assert goodput.rows([{"step": 1, "train/loss": 1.0}]) == []
    assert goodput.sums([{"step": 1, "train/loss": 1.0}]) == {}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({"steps": 99.0, "input": 0.4, "start": 0.6}, "99.0 % of 1 min 40 s went into"),
        ({"steps": 1.0}, "100.0 % of 1.0 s went into steps"),
        ({"start": 7860.0}, "0.0 % of 2 h 11 min went into steps; largest loss: start"),
        (
            {"steps": 3.0, "not_running": 9.0, "input": 1.0},
            "75.0 % of 4.0 s .*input, 25",
        ),
    ],
)
def test_one_line_says_the_useful_share_and_the_largest_loss(seconds, said):
    assert re.match(said, goodput.sentence(seconds))


@pytest.mark.slow
def test_the_table_of_a_run_in_three_starts_adds_up_to_what_the_starts_took(
    tmp_path, program, data_dir
):
    """The first one is killed, the second is asked to end."""
    run = tmp_path / "run"
    arguments = (
        "--config=configs/digits.py",
        "--config.total_steps=240",
        "--config.log_every_steps=5",
        "--config.checkpoint.every_steps=40",
        "--config.evals.test.every_steps=80",
        f"--data_dir={data_dir}",
        f"--workdir={run}",
    )
    took = 0.0
    for end, number in ((70, signal.SIGKILL), (160, signal.SIGTERM), (240, None)):
        began = time.monotonic()
        process = program("train", *arguments, devices=1)
        if number is not None:
            while step_of(run) < end:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.02)
            process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        took += time.monotonic() - began
        assert process.returncode == (-number if number == signal.SIGKILL else 0), said
    records = metrics.read(run)
    seconds = goodput.sums(records)
    seconds.pop("not_running")
    assert sum(seconds.values()) == pytest.approx(took, rel=0.02)
    assert {"steps", "compile", "repeated", "restart", "checkpoint"} <= seconds.keys()
    assert goodput.rows(records)[-2][0] == "all of 3 starts"
    assert goodput.sentence(seconds) in said


def step_of(run):
    return max((r["step"] for r in metrics.read(run)), default=0)
