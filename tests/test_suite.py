"""The suite: order of value, budget, resuming, failures, and its reports."""

import copy
import dataclasses
import json
import time
from typing import Any

import benchmark
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stacked_step
import suite
import suite_item
import suite_plan
import suite_plot
import suite_report
import timm_peer
from suite_plan import Item, Side

from mlp_mixer.planning import hlo

TINY = {
    "num_blocks": 1,
    "hidden_dim": 16,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 32,
}
IDENTITY = {
    "machine": {"platform": "cpu", "cpu_model": "some", "avx512": None}
    | {"device_kind": "cpu", "versions": {"jax": "1"}},
    "commit": "c0ffee",
    "sources": "1234",
    "dtype": "float32",
    "threads": 1,
}
ITEMS = [Item(name, (Side("ours", model="mixer_s32", batch=1),)) for name in "abcd"]


@pytest.fixture
def clock():
    """A clock that moves when told to."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def start(folder, clock, minutes, measured, seconds=20, **identity):
    """A suite whose items take `seconds`; `measured` gets the names, in order."""

    def measure(item, limit):
        measured.append(item.name)
        clock.now += min(seconds, limit)
        return {"status": "failed: 1" if item.name == "b" else "done", "sides": {}}

    made = suite.Suite(
        folder / "suite.json", IDENTITY | identity, ITEMS, measure, minutes, clock
    )
    made.run()
    return made.report


def saved(folder):
    return json.loads((folder / "suite.json").read_text())


# --- The run --------------------------------------------------------------------------


def test_items_run_in_order_of_value_and_a_failed_one_does_not_stop_them(
    tmp_path, clock
):
    measured: list[Any] = []
    report = start(tmp_path, clock, 60, measured)
    assert measured == ["a", "b", "c", "d"]
    assert [i["status"] for i in saved(tmp_path)["items"].values()] == [
        "done", "failed: 1", "done", "done",
    ]  # fmt: skip
    assert report["left_out"] == {}


def test_a_second_start_measures_what_is_missing(tmp_path, clock):
    start(tmp_path, clock, 60, [])
    measured: list[Any] = []
    report = start(tmp_path, clock, 60, measured)
    assert measured == ["b"]  # the failed one once more
    assert len(report["starts"]) == 2


def test_the_budget_is_not_exceeded_and_what_is_left_out_is_said(tmp_path, clock):
    expected = suite_plan.expected_seconds(ITEMS[0], suite_plan.MACHINES["cpu"])
    measured: list[Any] = []
    minutes = 2.5 * expected / 60
    report = start(tmp_path, clock, minutes, measured, seconds=expected)
    assert clock.now <= 60 * minutes
    assert measured == ["a", "b"]
    assert set(report["left_out"]) == {"c", "d"}
    assert "s are left" in report["left_out"]["d"]
    # They are measured by the next start, and then no longer left out.
    report = start(tmp_path, clock, 60, measured, seconds=expected)
    assert report["left_out"] == {}


def test_a_smaller_item_takes_the_place_of_one_that_does_not_fit(tmp_path, clock):
    large = Item("large", (Side("ours", model="mixer_h14", batch=64),))
    measured: list[Any] = []

    def measure(item, limit):
        measured.append(item.name)
        return {"status": "done", "sides": {}}

    items = [large, ITEMS[0]]
    suite.Suite(tmp_path / "s.json", IDENTITY, items, measure, 1, clock).run()
    assert measured == ["a"]


def test_an_item_that_asks_for_something_else_by_now_is_measured_again(tmp_path, clock):
    measured: list[Any] = []

    def measure(item, limit):
        measured.append(item.rounds)
        return {"status": "done", "sides": {}}

    for rounds in (5, 5, 3):
        items = [dataclasses.replace(ITEMS[0], rounds=rounds)]
        suite.Suite(tmp_path / "s.json", IDENTITY, items, measure, 9, clock).run()
    assert measured == [5, 3]


@pytest.mark.parametrize("key", suite.SAME)
def test_figures_of_another_machine_or_code_are_not_mixed(key, tmp_path, clock):
    start(tmp_path, clock, 60, [])
    with pytest.raises(ValueError, match=f"another {key}.*choose another --out"):
        start(tmp_path, clock, 60, [], **{key: "other"})


def test_another_commit_of_the_same_code_continues(tmp_path, clock):
    start(tmp_path, clock, 60, [])
    start(tmp_path, clock, 60, [], commit="decaf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--out=FOLDER says where the results go."),
        (["--minutes=0"], "'0' is not a number from 0.1"),
        (["--compare", "no/suite", "no/suite"], "No such file or directory"),
        (["--tables", "no/suite"], "No such file or directory"),
    ],
)
def test_mistakes_are_answered_in_words(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["suite", *arguments])
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("", 20, "done"),
        ("sys.exit(3)", 20, "failed: its process ended with 3"),
        ("os.kill(os.getpid(), 9)", 20, "failed: its process ended with -9"),
        ("time.sleep(60)", 0.5, "stopped after 0 s"),
    ],
)
def test_an_item_that_crashes_or_hangs_leaves_what_it_had(
    code, limit, status, tmp_path, monkeypatch
):
    body = "import os, sys, time\nopen(sys.argv[-1], 'w').write('{\"half\": 1}')\n"
    (tmp_path / "suite_item.py").write_text(body + code)
    monkeypatch.setattr(suite, "HERE", tmp_path)
    begun = time.monotonic()
    found = suite.in_a_process([], tmp_path / "answer.json", limit)
    assert found == {"half": 1, "status": status}
    assert time.monotonic() - begun < 15


def test_the_plans_have_one_name_for_each_item_and_side():
    for platform, machine in suite_plan.MACHINES.items():
        items = suite_plan.items_for(platform)
        assert items[0].name == "rates"
        names = [suite.file_name(item) for item in items]
        assert len(set(names)) == len(names)
        for item in items:
            labels = [side.label for side in item.sides]
            assert len(set(labels)) == len(labels), item.name
            assert 0 < suite_plan.expected_seconds(item, machine) < 3600
            assert all(side.flops > 0 for side in item.sides)


def test_the_pages_show_items_that_are_measured():
    for name in suite_report.PAGES:
        page = (suite_report.ROOT / name).read_text()
        for found in suite_report.MARKED.finditer(page):
            names = {item.name for item in suite_plan.items_for(found["platform"])}
            assert found["what"] in {None, "short", *names}


# --- One item -------------------------------------------------------------------------


def worker(*sides, **request):
    item = Item("tiny", sides, rounds=2)
    writes = []
    made = suite_item.Worker(
        {
            "item": json.loads(json.dumps(dataclasses.asdict(item))),
            "dtype": "float32",
            "threads": 1,
            "until": time.time() + 60,
            "seconds": 0,
            "timm_python": "no/such/python",
        }
        | request,
        lambda result: writes.append(copy.deepcopy(result)),
    )
    made.large = (8, 8, 8)
    return made, writes


def tiny(label, **fields):
    return Side(label, model="mixer_s32", batch=2, image_size=64, fields=TINY, **fields)


def test_an_item_times_what_works_and_names_what_does_not(tmp_path):
    made, writes = worker(
        tiny("timm eager", whose="timm", kind="forward"),
        tiny("unknown option", kind="forward", options={"xla_no_such_option": 1}),
        tiny("ours", kind="forward", program=True),
        programs=str(tmp_path),
    )
    made.run()
    sides = made.result["sides"]
    assert "xla_no_such_option" in sides["unknown option"]["error"]
    assert "no/such/python" in sides["timm eager"]["error"]
    ours = sides["ours"]
    assert len(ours["rounds"]["cpu_s"]) == 2
    assert ours["images_per_s"] == pytest.approx(2 / ours["median_s"])
    assert ours["temp_bytes"] > 0
    assert (tmp_path / "tiny_ours.hlo.gz").exists()
    assert ours["kernels"]["product fusion"]["count"] > 0
    # Every figure is written when it is there.
    assert [len(write["sides"]) for write in writes] == [1, 2, 3, 3, 3]
    assert [write.get("rounds") for write in writes] == [None] * 3 + [1, 2]
    assert "first_call" in writes[2]["sides"]["ours"]


@pytest.mark.slow
def test_all_sides_compute_the_same():
    made, _ = worker(
        tiny("ours", kind="forward"),
        tiny("one at a time", kind="forward", run={"images_at_once": 1}),
        tiny("literal", whose="literal", kind="forward"),
        tiny("bias row", whose="bias row", kind="forward"),
    )
    made.run()
    first, *others = (side["logits"]["first"] for side in made.result["sides"].values())
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)


def test_an_item_without_time_for_another_round_keeps_what_it_has():
    made, _ = worker(tiny("ours", kind="forward"), until=0)
    made.run()
    assert made.result["rounds"] == 1
    assert made.result["note"] == "time for 1 of 2 rounds"


@pytest.mark.slow
def test_a_state_stacked_in_memory_trains_to_the_same_parameters():
    side = tiny("ours", run={"scan": True, "remat": "pre_gelu"})
    made, _ = worker(side)
    bench = made.bench_of(side)
    state, batch = bench.random_state(), bench.random_batch()
    step, init = stacked_step.make_step(bench.models["ours"], bench.job)
    # Each step takes its state away, and both begin with the same arrays.
    params = jax.tree.map(jnp.copy, stacked_step.stacked(state.params))
    found = (params, init(params))
    for _ in range(2):  # the first update has learning rate 0
        found, metrics = step(found, batch)
        state, expected = bench.built.train_step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(expected["grad_norm"]), rel=1e-5
    )
    official = stacked_step.stacked(state.params)
    for one, two in zip(*map(jax.tree.leaves, (found[0], official)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("request_", [{"prepare": {}}, {"clock": "a", "times": 1}])
def test_without_timm_its_process_says_so(request_, monkeypatch):
    monkeypatch.setattr(timm_peer.importlib.util, "find_spec", lambda name: None)
    reply = timm_peer.answer(timm_peer.Timm(), request_)
    assert reply["error"].startswith("torch is not installed")


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("exec sleep 30", "did not answer within 0 s"),
        ("read line; exit 3", "ended with 3"),
        ('read line; echo \'{"error": "no GPU"}\'; read line', "no GPU"),
    ],
)
def test_a_peer_that_hangs_dies_or_refuses_is_told_apart(does, says, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    peer = suite_item.TimmProcess(str(python))
    with peer.process, pytest.raises(suite_item.PeerError, match=says):
        peer.ask({}, seconds=0.3 if "sleep" in does else 10)
    assert peer.process.returncode is not None


@pytest.mark.slow
def test_a_small_suite_runs_to_its_end_and_is_not_repeated(tmp_path, capfd):
    command = ["suite", f"--out={tmp_path}", "--only=train mixer_s32", "--minutes=5"]
    benchmark.main(command)
    report = saved(tmp_path)
    (result,) = report["items"].values()
    assert result["status"] == "done"
    assert result["sides"]["ours"]["images_per_s"] > 0
    assert result["sides"]["literal"]["images_per_s"] > 0
    assert (tmp_path / "table.md").exists()
    assert "S/32 training step, batch 4" in capfd.readouterr().out
    benchmark.main(command)
    assert "is there" in capfd.readouterr().err
    assert saved(tmp_path)["items"] == report["items"]


# --- Reports --------------------------------------------------------------------------


def side_of(*times, batch=8, **more):
    low, middle, high = sorted(times)
    return {
        "batch": batch,
        "median_s": middle,
        "min_s": low,
        "max_s": high,
        "spread": (high - low) / middle,
        "images_per_s": batch / middle,
        "share_of_product_rate": 0.5,
        "flops_per_image": 1e9,
    } | more


def item_of(**sides):
    made = {"status": "done", "date": "2026-11-25 9:00:00 UTC", "commit": "bee"}
    return {"sides": sides} | made


def report_of(**sides):
    items = {"train mixer_b16 batch 8": item_of(**sides)}
    starts = [{"date": "2026-11-26 12:00:00 UTC", "commit": "c0ffee"}]
    return IDENTITY | {"items": items, "starts": starts, "left_out": {}}


def test_a_comparison_is_of_medians_and_marks_what_leaves_the_spread():
    one = side_of(1.0, 1.1, 1.2)
    assert suite_report.speeds(one, side_of(0.5, 0.55, 0.6)) == pytest.approx(
        (2.0, 1.0 / 0.6, 1.2 / 0.5)
    )
    # Per image: the same time for twice the batch is twice the speed.
    assert suite_report.speeds(one, side_of(1.0, 1.1, 1.2, batch=16))[0] == 2
    a = report_of(ours=one, literal=one, gone=one)
    b = report_of(ours=side_of(0.5, 0.6, 0.99), literal=side_of(0.9, 1.0, 1.1))
    lines = suite_report.comparison(a, b).splitlines()
    (ours,) = (line for line in lines if line.endswith(": ours"))
    (literal,) = (line for line in lines if line.endswith(": literal"))
    assert "1.83   1.01 –  2.40  faster" in ours
    assert "1.10" in literal
    assert "faster" not in literal
    assert not any(line.endswith(": gone") for line in lines)
    back = suite_report.comparison(b, a)
    assert "0.55   0.42 –  0.99  slower" in back


def test_the_kernels_of_a_program_are_summed_by_kind():
    def kernel(kind, work, turns):
        return hlo.Kernel("k", kind, "forward", "", work, 3, 5, 0, turns)

    found = [
        kernel("library product", "gemm BIAS", 1),
        kernel("library product", "gemm GELU", 2),
        kernel("fusion", "add", 1),
        kernel("fusion", "reduce", 4),
    ]
    sums = suite_item.kernel_sums(found)
    assert sums["library product, gemm GELU"] == {
        "count": 2, "read_bytes": 6, "written_bytes": 10,
    }  # fmt: skip
    assert sums["fusion"] == {"count": 5, "read_bytes": 15, "written_bytes": 25}
    side = {"kernels": sums, "written_elsewhere_bytes": {"forward": 2e6, "update": 5e5}}
    text = suite_report.kernel_table(side)
    assert "| library product, gemm BIAS | 1 | 0 | 0 |" in text
    assert "write 2.50 MB per image and block" in text


def test_a_page_is_rewritten_between_its_marks_and_only_once(tmp_path):
    report = report_of(
        ours=side_of(1, 2, 3, temp_bytes=1), literal=side_of(2, 4, 6, temp_bytes=4)
    )
    page = (
        "# Title\n<!-- suite: cpu -->\nold\n<!-- end of suite -->\nbetween\n"
        "<!-- suite: gpu -->\nkept\n<!-- end of suite -->\n"
        "<!-- suite: cpu train mixer_b16 batch 8 -->\n<!-- end of suite -->\n"
        "<!-- suite: cpu not measured -->\nkept\n<!-- end of suite -->\n"
        "<!-- suite: cpu short -->\n<!-- end of suite -->\nend\n"
    )
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    (tmp_path / "README.md").write_text(page)
    written = list(suite_report.write_pages(report, tmp_path))
    assert written == ["docs/benchmarks/cpu_suite.json", "README.md"]
    kept = suite_report.load(str(tmp_path / "docs/benchmarks/cpu_suite.json"))
    assert kept == report
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text
    assert "| B/16 training step, batch 8 | 4 | 50% | 2.00 × | 0.25 |" in text
    assert "| B/16 training step, batch 8 | 4 | 50% | 2.00 × |\n" in text
    assert "some, 1 thread, CPU time, float32; jax 1; 2026-11-25, commit bee." in text
    assert "\nbetween\n<!-- suite: gpu -->\nkept\n" in text
    assert "| ours | 4 | 2,000.00 | 100% | 50% | 1.00 |" in text
    assert "| literal | 2 | 4,000.00 | 100% | 50% | 0.50 |" in text
    assert "\n(2026-11-25, commit bee)\n" in text
    assert "<!-- suite: cpu not measured -->\nkept\n" in text
    assert text.endswith("<!-- end of suite -->\nend\n")
    assert list(suite_report.write_pages(report, tmp_path)) == []
    # Of a suite that has measured something else, what was there stays.
    other = suite_report.rewritten(text, report | {"items": {}})
    assert other == (tmp_path / "README.md").read_text() == text


def test_several_suites_of_one_machine_are_one_and_the_last_counts():
    one, two = report_of(ours=side_of(1, 2, 3)), report_of(ours=side_of(2, 3, 4))
    one["items"]["other"] = one["items"]["train mixer_b16 batch 8"] | {"commit": "old"}
    both = suite_report.merged([one, two])
    assert both["items"]["train mixer_b16 batch 8"]["sides"] == {
        "ours": side_of(2, 3, 4)
    }
    assert suite_report.where(both).endswith("; 2026-11-25, commits bee, old")
    assert suite_report.merged([one]) == one
    with pytest.raises(ValueError, match="another threads: 1 and 2"):
        suite_report.merged([one, two | {"threads": 2}])


def test_the_plot_shows_curves_in_order_and_each_model_once(tmp_path):
    curve = {
        "2 images": side_of(1, 2, 3, batch=2),
        "1 images": side_of(1, 1, 1, batch=1),
        "4 images": {"batch": 4, "error": "out of memory"},
    }
    report = report_of(ours=side_of(1, 2, 3))
    for batch in (8, 32):
        name = f"train mixer_s16 batch {batch}"
        report["items"][name] = item_of(ours=side_of(1, 2, 3, batch=batch))
    assert suite_plot.costs(report, "train") == [
        ("mixer_b16", 1e9, 1 / 4), ("mixer_s16", 1e9, 1 / 16),
    ]  # fmt: skip
    assert list(suite_plot.write_plot(report, tmp_path / "a.png")) == [
        tmp_path / "a.png"
    ]
    report["items"]["curve of batches, forward"] = item_of(**curve)
    assert suite_plot.points(report, "batches", "forward") == [(1, 1.0), (2, 1.0)]
    list(suite_plot.write_plot(report, tmp_path / "b.png"))
    assert (tmp_path / "b.png").stat().st_size > (tmp_path / "a.png").stat().st_size
    report["items"] = {}
    assert list(suite_plot.write_plot(report, tmp_path / "c.png")) == []
