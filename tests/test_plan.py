"""Plans: topologies, what shapes say, what fits, how long it takes, what it costs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import plans
import pytest
from absl import flags
from jax import lax
from jax.experimental import roofline

from mlp_mixer import deit, models, plan, recipe
from mlp_mixer.models import layers
from mlp_mixer.planning import chips, counts, duration, report, search, targets
from mlp_mixer.planning.step import Planner, refused_bytes

ROOT = pathlib.Path(__file__).parents[1]


# --- Topologies -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        # Chips, devices, hosts: v3-128 and v4-128 count cores, v5e-256 chips.
        ("v3:8x8", (64, 128, 16)),
        ("v3:16x16", (256, 512, 64)),
        ("v4:4x4x4", (64, 64, 16)),
        ("v5e:16x16", (256, 256, 64)),
        ("v5p:2x2x1", (4, 4, 1)),
        ("v6e:8x8", (64, 64, 16)),
        ("h200:8", (8, 8, 1)),
        ("cpu:8", (8, 8, 1)),
    ],
)
def test_a_topology_has_chips_devices_and_hosts(name, found):
    (topology,) = chips.topologies(name)
    assert (topology.chips, topology.devices, topology.hosts) == found


def test_several_topologies_are_separated_by_commas():
    found = chips.topologies("v3:8x8,h200:8")
    assert [t.kind for t in found] == ["v3", "h200"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:8x8", "chip 'v7' is unknown"),
        ("v3", "has no grid of chips; expected e.g. v3:8x8"),
        ("v3:8x", "has no grid of chips"),
        ("v4:8x8", "has 2 side\\(s\\); a slice of v4 has three sides, e.g. v4:4x4x4"),
        ("v5e:3x5", "There is no slice 'v5e:3x5'; v5e comes in 1x1, 2x2, "),
        ("v5e:16x32", "There is no slice"),  # of v3 there is
        ("v4:4x4x6", "sides that are multiples of 4, the smallest first, e.g. 4x4x8"),
        ("v4:8x4x4", "the smallest first"),
        ("h200:16", "a host has 8"),
    ],
)
def test_a_slice_that_there_is_not_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        chips.topologies(name)


def test_every_figure_of_a_chip_has_its_source():
    for chip in chips.CHIPS.values():
        assert chip.source
        if chip.platform == "tpu" and chip.source.count("clock") == 0:
            # 128 x 128 multipliers, 2 operations, a clock: 2 cores of 2 are v3's.
            units = chip.flops / (chip.hertz * 2 * 128 * 128)
            assert round(units) in (4, 8)
            assert units == pytest.approx(round(units), rel=0.01)


# --- Counts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward"),
    # GFLOP for an image, products only, 2 per multiply-add.
    [("mixer_s32", 2.00), ("mixer_b16", 25.20)],
)
def test_the_forward_pass_costs_what_is_known(name, forward):
    model = models.create(name, num_classes=1000)
    model = model.clone(run=models.Run(scan=True))
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    jaxpr = jax.make_jaxpr(model.apply)(variables, image)
    assert counts.flops(jaxpr) / 2 / 1e9 == pytest.approx(forward, abs=5e-3)


def test_a_loops_body_counts_as_often_as_it_runs():
    def layers(x, kernels):
        return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    jaxpr = jax.make_jaxpr(layers)(jnp.zeros((4, 16)), jnp.zeros((3, 16, 16)))
    assert counts.flops(jaxpr) == 3 * 2 * 4 * 16 * 16


def test_jaxs_own_roofline_counts_the_same_where_nothing_is_scanned(tiny):
    config = recipe.completed(tiny)
    (topology,) = chips.topologies("cpu:1")
    built = Planner(config, topology, jax.devices()[:1]).build()
    batch = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((4,), "int32"),
    }
    _, found = roofline.roofline(built.train_step)(built.target, batch)
    jaxpr = jax.make_jaxpr(built.train_step)(built.target, batch)
    assert found.flops == counts.flops(jaxpr)
    assert found.hbm_bytes == counts.product_bytes(jaxpr)


def test_a_convolution_counts_each_multiply_add():
    def convolve(x, kernel):
        return lax.conv(x, kernel, (1, 1), "VALID")

    jaxpr = jax.make_jaxpr(convolve)(jnp.zeros((2, 3, 8, 8)), jnp.zeros((5, 3, 3, 3)))
    assert counts.flops(jaxpr) == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)


def test_a_filter_of_each_channel_counts_as_a_convolution():
    """Though it is a sum of shifted maps; and its gradients cost as much, each."""
    x, kernel = jnp.zeros((8, 6, 2, 5)), jnp.zeros((3, 5, 1, 5))

    def gradients(x, kernel):
        y, back = jax.vjp(layers.filter_channels, x, kernel)
        return back(2 * y)

    forward = jax.make_jaxpr(layers.filter_channels)(x, kernel)
    assert counts.flops(forward) == 2 * (8 * 6 * 2 * 5) * (3 * 5)
    backward = jax.make_jaxpr(jax.jit(gradients))(x, kernel)
    assert counts.flops(backward) == 3 * counts.flops(forward)


def test_what_returns_nothing_costs_nothing():
    def f(x):
        jax.debug.callback(lambda: None)
        return x @ x

    assert counts.flops(jax.make_jaxpr(f)(jnp.zeros((4, 4)))) == 2 * 4**3


def test_a_part_of_a_model_is_counted_alone():
    model = models.create("mixer_s32", num_classes=7, num_blocks=3)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    jaxpr = jax.make_jaxpr(model.apply)(variables, image)
    assert counts.flops(jaxpr, "head") == 2 * 512 * 7
    blocks = [counts.flops(jaxpr, f"MixerBlock_{i}") for i in range(3)]
    assert blocks == [2 * 2 * 49 * 512 * (256 + 2048)] * 3


def test_the_peak_is_what_lives_at_once():
    def chain(x):
        y = x @ x  # x, y
        z = y @ y  # x is an argument that nobody reads again, y, z
        return (jnp.tanh(z) * 2).sum()  # for free

    size = 64 * 64 * 4
    jaxpr = jax.make_jaxpr(chain)(jnp.zeros((64, 64)))
    peak = counts.peak(jaxpr, lambda a: float(a.size * a.dtype.itemsize))
    assert 2 * size <= peak <= 2 * size + 16


# --- Steps ----------------------------------------------------------------------------


@pytest.fixture
def eight():
    """Eight devices of this host."""
    (topology,) = chips.topologies("cpu:8")
    return topology


def test_shapes_say_what_the_compiled_step_says(tiny, eight):
    """Of a program for eight devices: memory within a quarter; what travels exactly."""
    tiny.model.hidden_dim, tiny.batch_size, tiny.mixup = 128, 256, 0.0
    tiny.model.stochastic_depth = 0.0
    tiny.run.scan, tiny.run.remat = True, "pre_gelu"
    found = plan.planner(tiny, eight, compiles=True)
    step, shapes = found.compiled(), found.reckoned()
    assert step.fits
    assert (step.origin, shapes.origin) == ("compiled", "shapes")
    assert shapes.peak == pytest.approx(step.peak, rel=0.25)
    assert step.compiled_flops == pytest.approx(step.flops, rel=0.01)
    # The gradients once, and what metrics and the clip need.
    _, carried = step.collectives["all-reduce"]
    assert carried == pytest.approx(shapes.collectives["all-reduce"][1], rel=0.01)
    assert carried == pytest.approx(step.parameters, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "sums"), [("none", 8), ("pre_gelu", 10)])
def test_sums_over_the_model_axis_are_reckoned(tiny, eight, remat, sums):
    """Of two blocks two MLPs each, both ways; the first MLP is computed again."""
    tiny.model.hidden_dim, tiny.batch_size, tiny.mixup = 128, 256, 0.0
    tiny.run.scan, tiny.run.remat = True, remat
    whole = plan.planner(tiny, eight, compiles=True)
    found = whole.changed(mesh={"data": 1, "model": 8})
    step, shapes = found.compiled(), found.reckoned()
    count, carried = shapes.collectives["all-reduce"]
    assert count == sums
    assert step.collectives["all-reduce"][1] == pytest.approx(carried, rel=0.05)


def test_fsdp_leaves_a_device_its_part(tiny, eight):
    whole = plan.planner(tiny, eight, compiles=False)
    cut = whole.changed(mesh={"data": 1, "fsdp": 8}, sharding="fsdp")
    before, after = whole.reckoned(), cut.reckoned()
    assert after.parameters < before.parameters / 3  # biases stay whole
    assert after.moments < before.moments / 3
    assert after.peak < before.peak - (before.moments - after.moments)
    assert set(after.collectives) == {"all-gather", "reduce-scatter"}
    parts = cut.shardings()
    assert sum(part.bytes for part in parts) == after.parameters
    rows = {row[0]: row[1:] for row in report.shardings("", parts).rows}
    kernel = rows["MixerBlock_*/channel_mixing/Dense_0/kernel"]
    # Of two blocks; 4096 floats in 8 parts each.
    assert kernel == ("2", "32 x 128", "c dc", "-, fsdp", "4 KiB")
    assert rows["stem/bias"][3] == "whole"


def test_a_model_of_several_stages_is_reckoned_too(eight):
    config = recipe.load("configs/family/digits.py:smlpnet")
    config.mesh.data, config.mesh.fsdp, config.mesh.model = -1, 2, 2
    config.sharding = "fsdp"
    step = plan.planner(config, eight, compiles=False).reckoned()
    assert step.mesh == {"data": 2, "fsdp": 2, "model": 2}
    assert 0 < step.needed_flops <= step.flops
    assert step.parameters + step.moments < step.peak
    assert set(step.collectives) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_a_recipe_that_does_not_say_its_classes_is_refused(tiny, eight):
    tiny.dataset.num_classes = None
    with pytest.raises(ValueError, match=r"give --config\.dataset\.num_classes"):
        plan.planner(tiny, eight, compiles=False)


def test_planning_opens_no_data(tiny, eight, monkeypatch):
    monkeypatch.setattr("mlp_mixer.data.sources.open_source", pytest.fail)
    assert plan.plan(tiny, eight, can_compile=False).step.fits


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        ("total memory required for HLO temporaries (25.13G) exceeds", 25.13 * 2**30),
        ("Ran out of memory in hbm. Used 17.5G of 15.75G hbm.", 16.5 * 2**30),
        ("Ran out of memory.", None),
    ],
)
def test_a_refusal_says_how_much_it_would_take(message, temporaries):
    found = refused_bytes(message, held=2.0**30)
    assert found == (temporaries and pytest.approx(temporaries))


# --- What fits ------------------------------------------------------------------------


def with_memory(monkeypatch, num_bytes):
    """A chip like those of this host, with so many bytes of memory."""
    chip = dataclasses.replace(chips.CHIPS["cpu"], memory=num_bytes)
    monkeypatch.setitem(chips.CHIPS, "cpu", chip)


def test_what_does_not_fit_gets_the_cheapest_that_does(tiny, eight, monkeypatch):
    tiny.model.hidden_dim, tiny.model.channels_mlp_dim = 256, 1024
    tiny.batch_size, tiny.run.remat = 64, "full"
    found = plan.planner(tiny, eight, compiles=False)
    needed = found.reckoned().peak
    with_memory(monkeypatch, needed * 0.75)
    made = plan.plan(tiny, eight, can_compile=False)
    assert not made.step.fits
    proposal = made.proposal
    assert proposal is not None
    assert proposal.step.fits
    assert "--config.mesh.data=" in proposal.words
    # The words make the recipe that was reckoned.
    again = search.changed(found, proposal.fields).reckoned()
    assert again.peak == proposal.step.peak
    others = search.reckoned(found)
    assert proposal == others[0]
    times = [p.step.roofline_seconds + p.step.link_seconds for p in others]
    assert times == sorted(times)
    text = "\n".join(report.remarks([made]))
    assert "it does not fit. The cheapest that does" in text
    assert proposal.words in text
    assert made.proposed is not None
    assert report.spread(made.proposed.chip_hours) in text


def test_after_a_refusal_only_what_takes_less_is_compiled(tiny, eight, monkeypatch):
    """Proposals by their bytes, the cheapest first; the compiler accepts 5 of them."""

    def of(peak):
        step = dataclasses.replace(plans.read("mixer_b16_v3-128")[1].step, peak=peak)
        return search.Proposal({"peak": peak}, step)

    compiled = []

    class Changed:
        def __init__(self, fields):
            self.peak = fields["peak"]

        def compiled(self):
            compiled.append(self.peak)
            return dataclasses.replace(of(self.peak).step, refused=self.peak > 5)

    monkeypatch.setattr(
        search, "reckoned", lambda planner: list(map(of, (10.0, 10.0, 9.5, 7.0, 4.0)))
    )
    monkeypatch.setattr(search, "changed", lambda planner, fields: Changed(fields))
    planner = plan.planner(tiny, eight, compiles=False)
    found = search.cheapest(planner, can_compile=True)
    assert compiled == [10.0, 7.0, 4.0]
    assert found == of(4.0)


def test_a_step_that_the_compiler_refuses_is_reckoned_from_shapes():
    config, found = plans.read("mixer_b16_v3-128")
    step = dataclasses.replace(found.shapes, origin="compiled", refused=True)
    assert not step.fits
    *_, text = duration.step_range(step, found.topology, config.run.dtype)
    assert "the roofline of shapes" in text


def test_where_nothing_fits_it_says_so(tiny, eight, monkeypatch):
    tiny.run.remat = "full"
    with_memory(monkeypatch, 1000.0)
    made = plan.plan(tiny, eight, can_compile=False)
    assert made.proposal is None
    assert "take more chips" in "\n".join(report.remarks([made]))


# --- Hours and cost -------------------------------------------------------------------


def of_b16(compiler_seconds):
    """B/16 on ImageNet, on a v3-128, whose step the compiler reckons so long."""
    config, found = plans.read("mixer_b16_v3-128")
    step = dataclasses.replace(found.step, compiler_seconds=compiler_seconds)
    return config, step, found.topology


def test_hours_follow_from_steps_and_cost_from_chip_hours(monkeypatch):
    monkeypatch.setattr(duration, "COMPILER_RATIOS", (1.0, 2.0))
    run = duration.run(*of_b16(0.036), price=3.0)
    assert run.steps == 92_897
    assert run.hours == pytest.approx((0.92897, 2 * 0.92897))
    assert run.chip_hours == pytest.approx((64 * 0.92897, 128 * 0.92897))
    assert run.cost == pytest.approx((192 * 0.92897, 384 * 0.92897))
    assert run.images_per_second == pytest.approx(4096 / 0.036)
    # Two checkpoints of parameters and both moments.
    assert run.checkpoint_bytes == pytest.approx(2 * 3 * 4 * 59_880_472, rel=1e-6)
    assert duration.run(*of_b16(0.036)).cost is None


def test_the_published_run_of_b16_is_in_the_range():
    """2 h 11 min on a v3-128, evaluations included."""
    _, found = plans.read("mixer_b16_v3-128")
    least, most = found.run.hours
    assert least <= 131 / 60 <= most


def test_the_ratios_are_those_of_published_runs_and_a_tenth_beyond():
    points = {n: row for n, row in plans.ratios().items() if n not in plans.COARSE}
    assert len(points) == 6
    for kind, (low, high) in {
        "compiler": duration.COMPILER_RATIOS,
        "roofline": duration.ROOFLINE_RATIOS,
        "shapes": duration.SHAPES_RATIOS,
    }.items():
        found = [row["published"] / row[kind] for row in points.values()]
        assert low == pytest.approx(0.9 * min(found), abs=0.006)
        assert high == pytest.approx(1.1 * max(found), abs=0.006)


def test_cores_are_those_that_the_input_benchmark_measured():
    record = json.loads((ROOT / "docs/benchmarks/cpu_input.json").read_text())
    for augments in (False, True):
        layers = 2 if augments else 0
        rates = {
            row["image_size"]: row["images_per_s_per_core"]
            for row in record["sizes"]
            if not row["jpegs"] and row["layers"] == layers
        }
        found = dict(zip(duration.SIDES, duration.RATES[augments], strict=True))
        assert found == pytest.approx(rates, rel=1e-3)
        name = " + RandAugment" if augments else ""
        of = [record["variants"][v + name] for v in ("2 workers", "direct")]
        pipeline, direct = (one["images_per_s_per_core"] for one in of)
        assert duration.PIPELINE[augments] == pytest.approx(pipeline / direct, rel=2e-3)


def test_the_input_of_deit_needs_more_cores_than_the_papers():
    config = deit.training("resmlp_12")
    rate = duration.images_per_core(config)
    config.input.crop = "inception"
    assert rate == pytest.approx(duration.images_per_core(config) * 435 / 1056)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.083, "83 ms"), (3.0, "3 s"), (131 * 60.0, "2.18 h"), (604_800.0, "7 days")],
)
def test_a_time_has_the_unit_that_fits(seconds, text):
    assert report.shown_time(seconds) == text


def test_a_price_is_one_or_one_for_each():
    assert plan._prices(None, 2) == [None, None]
    assert plan._prices("1.5", 2) == [1.5, 1.5]
    assert plan._prices("1,2.5", 2) == [1.0, 2.5]
    for wrong in ("a", "-1", "1,2", "nan"):
        with pytest.raises(ValueError, match="expected the price of a chip"):
            plan._prices(wrong, 3)


# --- Recorded plans -------------------------------------------------------------------


# GFLOP for an image and a step, nothing computed again: 3 forward passes without the
# gradient of the image.
TRAINING = {"b16": 75.4, "l16": 267.0, "h14": 725.6, "s32": 5.9, "s16": 22.5}


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_recorded_plan_was_compiled(name):
    config, found = plans.read(name)
    step, text = found.step, (plans.FOLDER / f"{name}.md").read_text()
    assert step.origin == "compiled"
    assert step.compile_seconds > 0
    assert step.compiler in text
    assert step.fits or found.proposal
    # The mesh divides the work.
    assert step.compiled_flops == pytest.approx(step.flops, rel=0.02)
    images = config.batch_size / found.topology.devices
    if expected := TRAINING.get(name.split("_")[1]):
        assert step.needed_flops / images / 1e9 == pytest.approx(expected, rel=0.01)


def test_the_page_shows_the_recorded_figures():
    page = (ROOT / "docs/plan.md").read_text()
    assert plans.summary() in page
    assert plans.table() in page


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_recorded_plan_has_todays_range(name):
    """python scripts/plans.py --refresh"""
    config, found = plans.read(name)
    assert found.run == duration.run(config, found.step, found.topology)


# --- The command, and compilers -------------------------------------------------------


def test_the_command_prints_one_table_for_several_topologies(
    tiny, monkeypatch, capsys, tmp_path
):
    values = {
        "config": tiny,
        "topology": "cpu:8,v3:2x2",
        "compile": False,
        "shardings": False,
        "json": False,
        "price": "2",
        "image_bytes": None,
        "output": str(tmp_path / "plan"),
    }
    monkeypatch.setattr(flags, "FLAGS", type("Flags", (), values))
    plan.main([])
    shown = capsys.readouterr().out
    assert "v3:2x2: from shapes alone." in shown
    assert "chip-hours" in shown
    assert "cost" in shown
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [one["topology"] for one in written] == ["cpu:8", "v3:2x2"]
    assert written[1]["run"]["cost"][0] == 2 * written[1]["run"]["chip_hours"][0]
    assert "| chip-hours |" in (tmp_path / "plan" / "plan.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v3:2x2", "h200:2"])
def test_two_blocks_compile_for_chips_that_are_not_here(topology, tmp_path):
    kind, _, _ = topology.partition(":")
    if message := targets.missing_wheels(kind):
        pytest.skip(message)
    words = [
        "--config=configs/mixer_s32.py:jft300m",
        "--config.model.num_blocks=2",
        "--config.batch_size=256",
        f"--topology={topology}",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "mlp_mixer.plan", *words, f"--output={tmp_path}"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=500)
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    step, shapes = found["step"], found["shapes"]
    assert step["origin"] == "compiled"
    assert found["fits"]
    assert step["compiled_flops"] == pytest.approx(step["flops"], rel=0.02)
    assert shapes["peak"] == pytest.approx(step["peak"], rel=0.3)
    assert step["collectives"]["all-reduce"][1] == pytest.approx(
        step["parameters"], rel=0.01
    )
    assert (step["compiler_seconds"] is not None) == (kind == "v3")
