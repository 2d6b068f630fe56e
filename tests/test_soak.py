"""The soak finds what it looks for, and a short one finds nothing."""

import itertools
import pathlib
import subprocess
import sys

import pytest
import soak_job
import soak_round

ROOT = pathlib.Path(__file__).parents[1]


def checkpoint(run, step):
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    (folder / "array").write_bytes(bytes([step]))
    return folder


@pytest.fixture
def ledger(tmp_path):
    """Of a run with three checkpoints, as many as it keeps."""
    for step in (4, 8, 12):
        checkpoint(tmp_path, step)
    found = soak_job.Ledger(tmp_path)
    found.check_kept()
    assert [*found.intact] == [4, 8, 12]
    return found


def test_what_newer_checkpoints_replace_is_not_lost(ledger, tmp_path):
    checkpoint(tmp_path, 16)
    (tmp_path / "checkpoints/00000004/array").unlink()  # half removed
    ledger.check_kept()
    assert [*ledger.intact] == [8, 12, 16]


@pytest.mark.parametrize("harm", ["removed", "changed"])
def test_an_intact_checkpoint_that_is_lost_is_found(harm, ledger, tmp_path):
    array = tmp_path / "checkpoints/00000012/array"
    array.unlink() if harm == "removed" else array.write_bytes(b"")
    with pytest.raises(soak_job.ViolationError, match="checkpoint 12 is lost"):
        ledger.check_kept()


def test_an_intact_checkpoint_that_is_set_aside_is_found(ledger, tmp_path):
    folder = tmp_path / "checkpoints/00000004"
    folder.rename(folder.with_name("damaged-00000004-1"))
    for step in (16, 20, 24):
        checkpoint(tmp_path, step)
    with pytest.raises(soak_job.ViolationError, match="was set aside as damaged-0"):
        ledger.check_kept()


def test_a_start_that_passes_over_an_intact_checkpoint_is_found(ledger):
    ledger.harmed, ledger.intact = {12}, {4: "", 8: ""}
    with pytest.raises(soak_job.ViolationError, match="checkpoint 8 is intact"):
        ledger.check_restored(4)
    ledger.check_restored(8)
    assert ledger.harmed == set()


RECORDS = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}]


@pytest.mark.parametrize(
    "wrong",
    [
        RECORDS[:1],
        RECORDS[1:],
        [*RECORDS, RECORDS[1]],
        [RECORDS[0], {"step": 2, "train/loss": 1.1}],
        [RECORDS[0], {"step": 2, "train/loss": float("nan")}],
        [RECORDS[0], {"step": 2}],
    ],
)
def test_records_that_are_not_those_of_the_uninterrupted_run_are_found(wrong):
    soak_job.check_records(RECORDS, RECORDS, 0)
    with pytest.raises(soak_job.ViolationError):
        soak_job.check_records(wrong, RECORDS, 0.05)


def test_every_kind_of_fault_happens_once_in_each_deck_and_is_a_function_of_the_seed():
    size = len(soak_round.KINDS)

    def dealt(seed, first=0):
        return [
            (fault.kind, fault.draw.random())
            for fault in itertools.islice(soak_round.faults(seed, first), 2 * size)
        ]

    for first in (0, size):
        kinds = [kind for kind, _ in dealt(3)[first : first + size]]
        assert sorted(kinds) == sorted(soak_round.KINDS)
    assert dealt(3) == dealt(3) != dealt(4)
    assert dealt(3, first=5)[: size - 5] == dealt(3)[5:size]


@pytest.mark.slow
def test_a_minute_of_faults_changes_no_result():
    soak = subprocess.run(
        [sys.executable, ROOT / "scripts/soak.py", "--minutes=1", "--seed=0"],
        capture_output=True,
        text=True,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "in all" in soak.stdout
