"""The host path's benchmark: what it makes, what it measures, without TensorFlow."""

import itertools
import json
import multiprocessing
import pathlib
import statistics
import time
from typing import Any

import benchmark
import input_benchmark
import numpy as np
import pytest

from mlp_mixer.data import decoding

TINY = "input --count=2 --shape=40x60 --bytes=2000 --image_size=16 --batch=3"
QUICK = f"{TINY} --workers --no-peer --rounds=2 --seconds=0 --sizes 8 16 --shapes 20x30"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One tiny run of what needs no TensorFlow and no processes."""
    out = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    benchmark.main([*QUICK.split(), f"--out={out}"])
    return json.loads(out.read_text())


def test_made_jpegs_are_deterministic_different_and_of_the_size_asked_for():
    jpegs = input_benchmark.photos(3, 375, 500, 50_000)
    assert jpegs[:2] == input_benchmark.photos(2, 375, 500, 50_000)
    assert len(set(jpegs)) == 3
    for data in jpegs:
        assert len(data) == pytest.approx(50_000, rel=0.1)
        assert decoding.decode(data).shape == (375, 500, 3)


def test_the_direct_calls_make_training_images():
    jpegs = input_benchmark.photos(2, 40, 60, 2000)
    spent: dict[str, list[float]] = {stage: [] for stage in input_benchmark.STAGES}
    images = input_benchmark.direct(jpegs, 16, 2, 15, spent)
    batch = np.stack([next(images) for _ in range(5)])
    assert batch.shape == (5, 16, 16, 3)
    assert batch.dtype == np.uint8
    assert all(len(times) == 5 for times in spent.values())


def test_both_ways_are_measured_with_and_without_randaugment(run):
    ways = ["direct", "threads"]
    assert list(run["variants"]) == ways + [f"{way} + RandAugment" for way in ways]
    for result in run["variants"].values():
        assert len(result["cpu_s"]) == len(result["wall_s"]) == 2
        assert result["median_s"] == statistics.median(result["cpu_s"])
    assert run["ratios"] == {}
    assert run["stages"].keys() == set(input_benchmark.STAGES)


def test_the_cores_for_a_rate_are_its_share_of_one_core(run):
    for name, result in run["variants"].items():
        for rate in input_benchmark.RATES:
            cores = run["cores_for_rate"][f"{rate:g}"][name]
            assert cores == pytest.approx(rate / result["images_per_s_per_core"])


def test_a_way_counts_by_all_of_its_cpu_time():
    times = {"cores": 2, "cpu_s": [3.0, 5.0], "wall_s": [1.0, 3.0]}
    peer = {"cores": 1, "cpu_s": [2.0, 2.0], "wall_s": [5.0, 5.0]}
    variants: dict[str, Any] = {"2 workers": times, "tf.data": peer}
    report: dict[str, Any] = {"variants": variants, "stages": {}, "sizes": []}
    input_benchmark.summarise(report, [10.0])
    assert report["variants"]["2 workers"]["median_s"] == 4.0
    assert report["ratios"]["2 workers"]["cpu"] == 0.5
    assert report["cores_for_rate"]["10"] == {"2 workers": 40.0, "tf.data": 20.0}


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="needs Linux's /proc")
def test_the_cpu_time_of_worker_processes_counts():
    before = input_benchmark.cpu_seconds() - time.process_time()
    process = multiprocessing.get_context("spawn").Process(
        target=sum, args=[range(9**8)]
    )
    process.start()
    try:
        end = time.monotonic() + 30
        spent = before
        while spent < before + 0.05 and time.monotonic() < end:
            time.sleep(0.02)
            spent = input_benchmark.cpu_seconds() - time.process_time()
        assert spent >= before + 0.05
    finally:
        process.kill()
        process.join()


def test_sizes_and_starts_of_steps_are_measured(run):
    sizes = [(one["jpegs"], one["image_size"], one["layers"]) for one in run["sizes"]]
    found = itertools.product([("", 8), ("", 16), ("20x30", 16)], (0, 2))
    assert sizes == [(*what, layers) for what, layers in found]
    assert all(one["images_per_s_per_core"] > 0 for one in run["sizes"])
    ways = ["nothing", "threads"]
    assert set(run["dispatch"]) == {
        f"{way}{load}" for way in ways for load in ("", ", interpreter busy")
    }


def test_without_tensorflow_the_table_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(input_benchmark.importlib.util, "find_spec", lambda name: None)
    benchmark.main(QUICK.replace("--no-peer", "--rate 1000").split())
    printed = capsys.readouterr().out
    assert "'.[prepare]'" in printed
    assert "tf.data +" not in printed
    assert "1,000 images/s: direct " in printed


def test_own_images_are_read_and_an_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["input", f"--images={tmp_path}"])
    assert "no JPEG" in capsys.readouterr().err
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.jpg").write_bytes(data := image_jpeg())
    (tmp_path / "notes.txt").write_text("not an image")
    assert input_benchmark.files(str(tmp_path), 5) == [data]


def image_jpeg():
    return input_benchmark.photos(1, 16, 24, 500)[0]
