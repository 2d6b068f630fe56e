"""The benchmark: what it counts, what it writes, and how little it needs."""

import json
import pathlib
import statistics
import subprocess
import sys

import benchmark
import jax
import jax.numpy as jnp
import literal_mixer
import measurement
import pytest

from mlp_mixer import models
from mlp_mixer.models import mixer

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH = 3
ROUNDS = 2
TINY = (
    "mixer_s16 --override=num_blocks=2 --override=hidden_dim=32 "
    "--override=tokens_mlp_dim=16 --override=channels_mlp_dim=64 "
    "--override=patch_size=(4,4) --override=num_classes=5 --image_size=16 "
    f"--batch={BATCH} --rounds={ROUNDS} --seconds=0"
)

# Lets nothing be imported but the standard library, the five packages (with what they
# bring along) and this repository. Flax brings rich and keeps it to itself.
BARE = """
import sys
sys.path.insert(0, "scripts")
import einops, flax.linen, jax, jaxtyping, optax
allowed = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names
allowed |= {"mlp_mixer", "arguments", "benchmark", "literal_mixer", "measurement"}
for name in list(sys.modules):
    if name.partition(".")[0] in ("rich", "absl"):
        del sys.modules[name]
allowed -= {"rich", "absl"}

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"not among the five: {name}", name=name)

sys.meta_path.insert(0, Bare())
"""

# Besides, tells the size of XLA's pool of CPU workers.
RUN = """
import pathlib
import benchmark
benchmark.main()
tasks = pathlib.Path("/proc/self/task").glob("*/comm")
print("workers", sum(t.read_text() == "tf_XLAEigen\\n" for t in tasks))
"""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BARE + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of everything, with the five packages alone: (process, JSON)."""
    out = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    done = python(RUN, *TINY.split(), f"--out={out}")
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text())


# --- FLOPs ----------------------------------------------------------------------------

# GFLOP per image forward and in training, by hand from Table 1 (1,000 classes).
GFLOP = {
    "mixer_s32": (2.00, 5.9),
    "mixer_s16": (7.55, 22.5),
    "mixer_b32": (6.48, 19.2),
    "mixer_b16": (25.20, 75.4),
    "mixer_l32": (22.51, 67.2),
    "mixer_l16": (89.10, 267.0),
    "mixer_h14": (241.98, 725.6),
}


@pytest.mark.parametrize("name", mixer.SIZES)
def test_analytic_flops_are_those_of_table_1(name):
    counted = measurement.flops(models.create(name, num_classes=1000), (224, 224))
    forward, train = GFLOP[name]
    assert counted["forward"] / 1e9 == pytest.approx(forward, abs=0.005)
    assert counted["train"] / 1e9 == pytest.approx(train, abs=0.05)


@pytest.mark.parametrize("name", mixer.SIZES)
def test_analytic_flops_agree_with_the_compilers_count(name):
    model = models.create(name, num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    lowered = jax.jit(lambda v, x: model.apply(v, x)[0]).lower(variables, image)
    counted = measurement.flops(model, (224, 224))["forward"]
    # Elementwise work comes on top.
    cost = lowered.cost_analysis()
    assert cost is not None
    assert 1.0 < cost["flops"] / counted < 1.02


def test_flops_follow_image_shape_and_head():
    model = models.create("mixer_s16", num_classes=None, image_size=(32, 64))
    one, two = (
        measurement.flops(model, size)["forward"] for size in ((32, 64), (64, 64))
    )
    assert two == 2 * one
    headed = models.create("mixer_s16", num_classes=7)
    assert measurement.flops(headed, (32, 64))["forward"] - one == 2 * 512 * 7


# --- One run --------------------------------------------------------------------------


def test_the_report_says_what_ran_where(run):
    _, report = run
    assert report["command"].startswith("python scripts/benchmark.py " + TINY)
    assert set(report["versions"]) == {
        "python", "jax", "jaxlib", "flax", "optax", "numpy",
    }  # fmt: skip
    assert report["platform"] == report["device_kind"] == "cpu"
    assert report["cpu_model"]
    assert report["devices"] == report["cpu_threads"] == 1
    assert report["flags"]["NPROC"] == "1"
    assert report["batch"] == BATCH
    model = report["model"]
    assert (model["num_blocks"], model["patch_size"]) == (2, [4, 4])
    assert model["image_size"] == [16, 16]
    # As the programs choose: 4,096 images of 16 tokens by 32 channels.
    how = {key: model[key] for key in ("scan", "remat", "images_at_once")}
    assert how == {"scan": False, "remat": "none", "images_at_once": 2048}
    assert (report["loss"], report["optim"]["weight_decay"]) == ("sigmoid_xent", 0.1)


def test_every_variant_has_times_memory_and_compile_time(run):
    _, report = run
    names = {f"{k} {m}" for k in ("forward", "train") for m in ("ours", "literal")}
    assert set(report["variants"]) == names
    rate = report["product"]["operations"] / statistics.median(
        report["product"]["cpu_s"]
    )
    assert report["product"]["flops_per_s"] == pytest.approx(rate)
    for result in report["variants"].values():
        assert len(result["cpu_s"]) == len(result["wall_s"]) == ROUNDS
        median = statistics.median(result["cpu_s"])
        assert result["median_s"] == pytest.approx(median)
        assert result["min_s"] <= median <= result["max_s"]
        assert result["images_per_s"] == pytest.approx(BATCH / median)
        share = result["flops_per_image"] * BATCH / median / rate
        assert result["share_of_product_rate"] == pytest.approx(share)
        assert result["compile_cpu_s"][0] > 0
        assert result["compile_wall_s"][0] > 0
        assert result["argument_bytes"] > 0
        assert result["temp_bytes"] > 0
    xla = {k: r["xla_flops_per_image"] for k, r in report["variants"].items()}
    assert xla["train ours"] > 2 * xla["forward ours"]
    assert xla["forward ours"] >= report["variants"]["forward ours"]["flops_per_image"]
    assert xla["train literal"] > 2 * xla["forward literal"]


def test_a_training_step_gives_its_state_away(run):
    _, report = run
    for name in ("train ours", "train literal"):
        # Parameters and both moments, hence all arguments but the batch.
        result = report["variants"][name]
        batch_bytes = BATCH * (16 * 16 * 3 + 4)
        assert result["alias_bytes"] >= result["argument_bytes"] - batch_bytes - 64


def test_both_models_compute_the_same_logits(run):
    _, report = run
    assert report["logits_largest"] > 0.1  # not of a zero head
    assert report["logits_difference"] < 1e-5 * report["logits_largest"]


def test_ratios_are_printed_as_written(run):
    done, report = run
    variants, ratios = report["variants"], report["ratios"]
    for kind in ("forward", "train"):
        ours, literal = variants[f"{kind} ours"], variants[f"{kind} literal"]
        speed = literal["median_s"] / ours["median_s"]
        assert ratios[f"{kind}_speed"] == pytest.approx(speed)
        best = literal["min_s"] / ours["min_s"]
        assert ratios[f"{kind}_speed_of_best"] == pytest.approx(best)
        memory = ours["temp_bytes"] / literal["temp_bytes"]
        assert ratios[f"{kind}_temp_memory"] == pytest.approx(memory)
    printed = {
        line.split()[0]: line.split()[1]
        for line in done.stdout.splitlines()
        if line.split(" ")[0] in ratios
    }
    assert printed == {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
    for name in variants:
        assert f"\n{name} " in done.stdout
        assert f"compiling {name}" in done.stderr
    assert f"round {ROUNDS}/{ROUNDS}" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_thread_is_one_worker(run):
    assert "\nworkers 1\n" in run[0].stdout


# --- Bare imports ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["models", "losses", "steps", "optim", "sharding"])
def test_the_core_imports_with_five_packages(name):
    done = python(f"import mlp_mixer.{name}")
    assert done.returncode == 0, done.stderr


def test_a_recipe_without_ml_collections_is_refused_in_words():
    done = python("import benchmark; benchmark.main()", "configs/mixer_b16.py")
    assert done.returncode == 2
    assert "not among the five" in done.stderr.splitlines()[-1]


# --- The command line -----------------------------------------------------------------


def job(*arguments):
    return benchmark.job_of(benchmark.parser().parse_args(arguments))


def test_a_recipe_brings_model_optimiser_loss_and_mixup():
    found = job("configs/mixer_b16.py:imagenet21k")
    assert found.dataset.num_classes == 21_843
    assert found.model["stochastic_depth"] == 0.1
    assert (found.loss, found.mixup) == ("sigmoid_xent", 0.2)
    assert found.optim["weight_decay"] == 0.1
    assert found.total_steps == round(300 * 14_145_922 / 4096)
    bench = benchmark.Bench(found, batch=2, devices=1, peer=True)
    assert bench.models["ours"].head_bias == -10.0


def test_options_and_overrides_reach_the_model():
    found = job(
        "mixer_b16", "--dtype=bfloat16", "--no-scan", "--remat=full",
        "--image_size=64", "--override=gelu=exact", "--override=num_blocks=3",
    )  # fmt: skip
    bench = benchmark.Bench(found, batch=2, devices=1, peer=True)
    ours = bench.models["ours"]
    how = ours.run
    assert (how.dtype, how.scan, how.remat) == ("bfloat16", False, "full")
    assert (ours.gelu, ours.num_blocks, bench.size) == ("exact", 3, (64, 64))
    literal = bench.models["literal"]
    assert isinstance(literal, literal_mixer.LiteralMixer)
    assert (literal.dtype, literal.num_blocks) == ("bfloat16", 3)
    target, its = bench.built.target, bench._build(literal).target
    assert jax.tree.map(lambda x: x.shape, its) == jax.tree.map(
        lambda x: x.shape, target
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resmlp_12"], "resmlp_12 is no MLP-Mixer"),
        (["mixer_b61"], "model 'mixer_b61' is unknown; try mixer_b16"),
        (["mixer_b16", "--override=num_block=2"], "no field 'num_block'"),
        (["mixer_b16", "--image_size=225"], "not divisible by patch_size 16"),
        (["mixer_b16", "--override=num_blocks"], "expected KEY=VALUE"),
        (["mixer_b16", "--override=num_blocks=0"], "num_blocks is 0; expected"),
        (["mixer_b16", "--override=patch_size=16"], "patch_size is 16; expected"),
        (["mixer_b16", "--image_size=0"], "'0' is not a whole number from 1 to 32,768"),
        (["mixer_b16", "--batch=0"], "'0' is not a whole number from 1"),
        (["mixer_b16", "--batch=x"], "'x' is not a whole number from 1"),
        (["mixer_b16", "--rounds=-1"], "'-1' is not a whole number from 1"),
        (["mixer_b16", "--devices=0"], "'0' is not a whole number from 1"),
        (["mixer_b16", "--threads=-1"], "'-1' is not a whole number from 0"),
        (["mixer_b16", "--seconds=nan"], "'nan' is not a number from 0"),
        (["mixer_b16", "--out=/no/where.json"], "cannot be written; name a file in a"),
        (["input", "--shape=3"], "'3' is not HEIGHTxWIDTH"),
        (["input", "--magnitude=21"], "'21' is not a number from 0 to 20"),
        (["input", "--rate", "0"], "'0' is not a number from 0.001"),
        (["input", "--workers", "0"], "'0' is not a whole number from 1"),
        (["configs/mixer_b61.py"], "There is no recipe 'configs/mixer_b61.py'"),
    ],
)
def test_mistakes_are_answered_in_words(arguments, says, capsys, monkeypatch):
    # This process keeps its devices.
    monkeypatch.setattr(benchmark, "start_devices", lambda threads, count: None)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert says in capsys.readouterr().err


def test_compile_only_runs_nothing_and_repeats(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "start_devices", lambda threads, count: None)
    monkeypatch.setattr(benchmark, "measure", None)
    out = tmp_path / "compiled.json"
    more = ["--compile-only", "--only=forward", "--no-peer", f"--out={out}"]
    benchmark.main([*TINY.split(), "--images_at_once=1", *more])
    report = json.loads(out.read_text())
    (name, result), = report["variants"].items()  # fmt: skip
    assert name == "forward ours"
    assert len(result["compile_cpu_s"]) == ROUNDS
    assert "cpu_s" not in result
    # Inside a loop the compiler's count would be of one turn.
    assert result["xla_flops_per_image"] is None
    assert report["ratios"] == {}
    assert "forward ours" in capsys.readouterr().out
