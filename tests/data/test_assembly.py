"""Batches are put together in place, by threads or by processes that stay."""

import contextlib
import itertools
import os
import threading
import time

import jax
import numpy as np
import pytest
from counted_rows import Counted, TwoArgumentsError

from mlp_mixer.data import assembly

WORKERS = (0, 2)


@contextlib.contextmanager
def batches(of, workers):
    with contextlib.closing(assembly.Batches(of, workers)) as made:
        yield made


def assert_right(batch, step, rows=5):
    assert batch["image"].shape == (rows, 3, 2)
    assert (batch["image"] == step % 251).all()
    assert batch["place"].tolist() == [[step, row] for row in range(rows)]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("rows", [1, 5, 16, 100])
def test_batches_come_in_order_with_each_row_in_its_place(rows, workers):
    with batches(Counted(rows, steps=30), workers) as made:
        for step, batch in enumerate(made):
            assert_right(batch, step, rows)
        assert step == 29
        assert next(made, None) is None


@pytest.mark.parametrize("workers", WORKERS)
def test_memory_is_used_again_only_when_nobody_refers_to_it(workers):
    kept, taken_over = {}, {}
    with batches(Counted(64), workers) as made:
        for step, batch in enumerate(itertools.islice(made, 200)):
            assert_right(batch, step, 64)
            if step % 40 == 7:
                kept[step] = batch["image"][3:5]  # a part of it counts too
            if step % 40 == 9:  # on a CPU JAX may take the memory as it is
                taken_over[step] = jax.device_put(batch["image"])
        blocks = made._stream.blocks
    del batch
    for step, image in [*kept.items(), *taken_over.items()]:
        assert (np.asarray(image) == step).all()
    # Those in advance and those referred to; JAX lets go of some a little later.
    assert blocks < 60


def test_threads_end_with_their_batches():
    before = threading.active_count()
    with batches(Counted(), 0) as made:
        next(made)
        assert threading.active_count() == before + 4
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert next(made, None) is None


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_after_the_batches_before_it_and_says_where(workers):
    with batches(Counted(broken_step=3), workers) as made:
        for step in range(3):
            assert_right(next(made), step)
        with pytest.raises(ValueError, match="row 4 of step 3") as caught:
            next(made)
    assert str(caught.value) == "row 4 of step 3 is broken"
    if workers:
        (note,) = caught.value.__notes__
        assert note.startswith("In a process that decodes images:")
        assert "counted_rows.py" in note


def test_an_error_that_cannot_be_sent_is_told_in_words():
    of = Counted(broken_step=0, error=TwoArgumentsError)
    with (
        batches(of, 2) as made,
        pytest.raises(RuntimeError, match="TwoArgumentsError: row: broken"),
    ):
        next(made)


def test_all_streams_come_from_the_same_processes():
    makers = set()
    with batches(Counted(), 2) as training:
        for step in range(0, 12, 3):
            with batches(Counted(7, steps=6), 2) as evaluation:
                for k, batch in enumerate(itertools.islice(evaluation, 6 - step % 2)):
                    assert_right(batch, k, 7)
                    makers |= {*batch["by"].tolist()}
            for k in range(3):
                batch = next(training)
                assert_right(batch, step + k)
                makers |= {*batch["by"].tolist()}
    assert len(makers) <= 2
    assert os.getpid() not in makers


def test_worker_processes_forget_a_stream_that_is_closed():
    with batches(Counted(), 2) as first:
        next(first)
    with batches(Counted(), 2) as second:
        for _ in range(30):  # what was asked of the first is done
            next(second)
        assert [*first_pool()._streams] == [second._stream.number]


def first_pool():
    return assembly._pools[2]


def test_a_death_that_is_noticed_by_a_stream_that_ends_is_told_to_the_others():
    with batches(Counted(steps=2), 2) as ending, batches(Counted(), 2) as made:
        next(made)
        next(ending)
        while ending._stream.made[1].tasks:
            first_pool()._receive()
        for worker in first_pool()._workers:
            worker.process.kill()
            worker.process.join()
        assert_right(next(ending), 1)
        with pytest.raises(ChildProcessError, match="exit code -9"):
            [*itertools.islice(made, 1000)]


def test_after_the_death_of_a_worker_the_next_stream_has_new_ones():
    with batches(Counted(), 2) as made:
        next(made)
        first_pool()._workers[0].process.kill()
        with pytest.raises(ChildProcessError, match=r"exit code -9.*fewer input\.work"):
            [*itertools.islice(made, 1000)]
    with batches(Counted(), 2) as made:
        assert_right(next(made), 0)
