"""Table 1 of the paper, and the errors of `models.create`."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mlp_mixer import models, sharding
from mlp_mixer.models.derivatives import Dense

# Computed from the paper's Table 1; the counts of B/32, B/16 and L/16 with 1,000
# classes are asserted by the official code's own test (vit_jax/models_test.py).
PARAMETERS = {
    "mixer_s32": {None: 18_591_624, 1000: 19_104_624, 21_843: 29_797_083},
    "mixer_s16": {None: 18_015_264, 1000: 18_528_264, 21_843: 29_220_723},
    "mixer_b32": {None: 59_524_428, 1000: 60_293_428, 21_843: 76_321_695},
    "mixer_b16": {None: 59_111_472, 1000: 59_880_472, 21_843: 75_908_739},
    "mixer_l32": {None: 205_914_264, 1000: 206_939_264, 21_843: 228_303_339},
    "mixer_l16": {None: 207_171_168, 1000: 208_196_168, 21_843: 229_560_243},
    "mixer_h14": {None: 431_069_952, 1000: 432_350_952, 21_843: 459_050_835},
}


def shapes(model, image_size=224):
    image = jnp.zeros((1, image_size, image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]


@pytest.mark.parametrize("classes", [None, 1000, 21_843])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name, classes):
    tree = shapes(models.create(name, num_classes=classes))
    assert sum(x.size for x in jax.tree.leaves(tree)) == PARAMETERS[name][classes]


def test_the_table_holds_the_seven_variants():
    assert list(models.mixer.SIZES) == list(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_widths_keep_the_papers_ratios(name):
    model = models.create(name)
    assert model.channels_mlp_dim == 4 * model.hidden_dim
    assert 2 * model.tokens_mlp_dim == model.hidden_dim


def test_the_parameter_tree_has_the_official_names():
    tree = shapes(models.create("mixer_s32", num_classes=10, num_blocks=2))
    names = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    block = {
        "LayerNorm_0/scale": (512,),
        "LayerNorm_0/bias": (512,),
        "token_mixing/Dense_0/kernel": (49, 256),
        "token_mixing/Dense_0/bias": (256,),
        "token_mixing/Dense_1/kernel": (256, 49),
        "token_mixing/Dense_1/bias": (49,),
        "LayerNorm_1/scale": (512,),
        "LayerNorm_1/bias": (512,),
        "channel_mixing/Dense_0/kernel": (512, 2048),
        "channel_mixing/Dense_0/bias": (2048,),
        "channel_mixing/Dense_1/kernel": (2048, 512),
        "channel_mixing/Dense_1/bias": (512,),
    }
    expected = {
        "stem/kernel": (32, 32, 3, 512),
        "stem/bias": (512,),
        "pre_head_layer_norm/scale": (512,),
        "pre_head_layer_norm/bias": (512,),
        "head/kernel": (512, 10),
        "head/bias": (10,),
    }
    expected |= {f"MixerBlock_{i}/{k}": v for i in range(2) for k, v in block.items()}
    assert names == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_an_override_of_none_means_the_tables_value():
    model = models.create("mixer_b16", num_blocks=None, hidden_dim=64)
    assert (model.num_blocks, model.hidden_dim) == (12, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mixer_b61"}, "'mixer_b61' is unknown; try mixer_b16"),
        (
            {"name": "mixer_b16", "image_size": (225, 224)},
            "image_size 225 is not divisible by patch_size 16; try 224 or 240",
        ),
        (
            {"name": "mixer_h14", "image_size": (224, 5)},
            "image_size 5 is not divisible by patch_size 14; try 14",
        ),
        ({"name": "mixer_b16", "droput": 0.1}, "no field 'droput'; try dropout"),
        ({"name": "mixer_b16", "num_blocks": 0}, "num_blocks is 0; expected a whole"),
        ({"name": "mixer_b16", "hidden_dim": 1.5}, "hidden_dim is 1.5; expected a who"),
        ({"name": "mixer_b16", "num_classes": 0}, "num_classes is 0; expected a whole"),
        ({"name": "mixer_b16", "tokens_mlp_dim": True}, "tokens_mlp_dim is True; expe"),
        (
            {"name": "mixer_b16", "patch_size": 16},
            r"patch_size is 16; expected .height",
        ),
        ({"name": "mixer_b16", "patch_size": (16,)}, r"patch_size is .16,.; expected"),
        (
            {"name": "mixer_b16", "patch_size": (0, 8)},
            r"patch_size is .0, 8.; expected",
        ),
        (
            {"name": "smlpnet_t", "num_blocks": (2, 8, 14)},
            r"num_blocks is .2, 8, 14.; expected 4 whole numbers from 1",
        ),
        (
            {"name": "smlpnet_t", "image_size": (224, 232)},
            "image_size 232 is not divisible by the last stage's stride 32; try 224 or",
        ),
        (
            {"name": "mixer_b16", "image_size": (-16, 16)},
            r"image_size is .-16, 16.; ex",
        ),
    ],
)
def test_errors_teach(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(**arguments)


def on(platform, count=1):
    devices = [
        mock.Mock(platform=platform, id=i, process_index=0) for i in range(count)
    ]
    return Mesh(np.array(devices), ("data",))


def test_products_are_flat_on_one_cpu_and_nowhere_else():
    assert models.Run(mesh=on("cpu")).flat
    assert not models.Run(mesh=on("cpu", 2)).flat
    # The only one of its kind, but no CPU.
    assert not models.Run(mesh=on("gpu")).flat
    assert not models.Run().flat


@pytest.mark.parametrize(("axis", "matrix"), [(0, (4, 3 * 5)), (-1, (2 * 3, 4))])
def test_a_flat_products_bias_is_added_to_a_matrix(axis, matrix):
    # Else its gradient is a sum over two axes of three, which XLA's CPU takes so long
    # for in bfloat16 that a training step lasts a sixth longer.
    dense = Dense(4, axis, models.Run("bfloat16", mesh=on("cpu")))
    x = jnp.ones((2, 3, 5))
    params = dense.init(jax.random.key(0), x)
    applied = jax.make_jaxpr(dense.apply)(params, x)
    (sum_,) = [e for e in applied.eqns if e.primitive.name == "add"]
    assert [v.aval.shape for v in sum_.invars] == [matrix, matrix]


def test_inference_on_one_cpu_holds_one_hidden_layer_at_a_time():
    run = models.Run(mesh=sharding.make_mesh(1))
    model = models.create("mixer_s16", num_classes=10, num_blocks=2, run=run)
    image = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    predict = jax.jit(lambda variables, image: model.apply(variables, image)[0])
    memory: Any = predict.lower(variables, image).compile().memory_analysis()
    hidden = 4 * 2 * 8 * 8 * model.channels_mlp_dim
    # One, overwritten by its GELU, and two states; never two of them.
    assert memory.temp_size_in_bytes < 2 * hidden


def chosen(mesh, name="mixer_b16", side=224, **given):
    model = models.create(name, num_classes=10)
    return models.Run.choose(model, (side, side), mesh, **given)


def test_a_gpu_trains_unrolled_and_a_recipe_can_say_otherwise():
    def how(*args, **given):
        run = chosen(on(*args), **given)
        return run.scan, run.remat

    assert how("gpu") == how("cpu") == how("cpu", 8) == (False, "none")
    assert how("tpu") == (True, "pre_gelu")
    assert how("gpu", scan=True) == (True, "pre_gelu")
    assert how("tpu", remat="full") == (True, "full")
    assert how("tpu", scan=False) == (False, "none")


def test_one_cpu_takes_as_many_images_at_a_time_as_its_cache_holds():
    images = {
        name: chosen(on("cpu"), name, side).images_at_once
        for name, side in [("mixer_s16", 224), ("mixer_b16", 224), ("mixer_h14", 3584)]
    }
    # 196 · 512 and 196 · 768 floats each; one of the last is larger than the cache.
    assert images == {"mixer_s16": 10, "mixer_b16": 6, "mixer_h14": 1}
    assert chosen(on("cpu"), dtype="bfloat16").images_at_once == 13
    assert chosen(on("cpu"), images_at_once=3).images_at_once == 3
    assert chosen(on("cpu"), "cyclemlp_b1", 224).images_at_once is None  # convolves
    for mesh in (on("cpu", 8), on("gpu"), on("tpu")):
        assert chosen(mesh).images_at_once is None


def test_a_batch_is_cut_into_equal_parts_that_are_not_small():
    parts = models.Run(images_at_once=10).parts
    assert [parts(n) for n in (1, 10, 12, 20, 32, 35)] == [1, 1, 2, 2, 4, 5]
    # Of 22 the next part is 2 images, of a prime number 1.
    assert parts(22) == parts(31) == 1
    assert models.Run().parts(1000) == 1


def test_the_log_says_how_a_model_is_computed():
    assert str(chosen(on("cpu"))) == (
        "float32, unrolled blocks keeping everything, at most 6 images at once"
    )
    assert str(chosen(on("tpu"), dtype="bfloat16")) == (
        "bfloat16, one scanned block keeping pre-activations"
    )


def test_an_architecture_makes_any_size_of_which_all_is_said():
    sizes = models.fields("mixer_s16", num_blocks=2)
    assert models.create("mixer", **sizes) == models.create("mixer_s16", num_blocks=2)
    del sizes["hidden_dim"], sizes["num_blocks"]
    with pytest.raises(ValueError, match="mixer needs num_blocks, hidden_dim; give ea"):
        models.create("mixer", **sizes)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (tuple[int, int], (2, 4), (2,)),
        (tuple[int, int, int], (1, 2, 3), (1, 2)),
        (tuple[int, ...], (1, 2, 3), ()),
        (tuple[int, ...], (1,), (1, 0)),
        (tuple[float, float], (0.0, 0.1), None),
    ],
)
def test_a_field_by_stage_has_as_many_sizes_as_its_type_says(kind, good, bad):
    models._check_size("field", good, kind)
    if bad is not None:
        with pytest.raises(ValueError, match="field is"):
            models._check_size("field", bad, kind)
