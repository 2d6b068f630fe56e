"""I-MLP is the MLP of its interpolated matrices, and at its ends Mixer and MLP."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import convert, models, pretrained, recipe, steps, train
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models import Run, imlp
from mlp_mixer.models.derivatives import Dense

FIELDS: dict[str, Any] = {
    "patch_size": (2, 4),
    "num_blocks": 1,
    "hidden_dim": 3,
    "tokens_mlp_dim": 5,
    "channels_mlp_dim": 4,
    "num_classes": 7,
}
SIZE, S, C = (4, 8), 4, 3
# dtype, error relative to the largest value.
DTYPES = pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-9), ("float32", 1e-4)]
)


def model_of(alpha, dtype="float64"):
    return models.create("imlp", **FIELDS, alpha=alpha, run=Run(dtype=dtype))


def image(dtype="float64"):
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, *SIZE, 3)), dtype)


def random_variables(model, seed=1, dtype="float64"):
    """All random, so that nothing hides behind a zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image(dtype))

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) / 3
        return jnp.asarray(noise + (path[-1].key == "scale"), dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def logits(model, variables, dtype="float64"):
    return compiled(model)(variables, image(dtype))[0]


def assert_close(found, expected, error=1e-9):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=error * np.abs(expected).max()
    )


# --- Unrolled -------------------------------------------------------------------------


def of_tokens(kernel):
    """The matrix over all units of a map of tokens; units are in rows."""
    return np.kron(kernel, np.eye(C))


def of_channels(kernel):
    return np.kron(np.eye(S), kernel)


def test_the_unrolled_maps_are_the_mixers_products():
    with jax.enable_x64():
        x = np.random.default_rng(2).normal(size=(S, 6, C))
        units = x.swapaxes(0, 1).reshape(6, S * C)
        for axis, unroll, features in ((0, of_tokens, 5), (-1, of_channels, 4)):
            dense = Dense(features, axis, Run(dtype="float64"), use_bias=False)
            variables = dense.init(jax.random.key(0), jnp.asarray(x))
            found = np.asarray(dense.apply(variables, jnp.asarray(x)))
            kernel = np.asarray(variables["params"]["kernel"])
            expected = units @ unroll(kernel)
            assert_close(found.swapaxes(0, 1).reshape(6, -1), expected, 1e-12)


class Numpy:
    """A plain MLP of the interpolated weights, each a matrix over all units."""

    def __init__(self, variables, alpha):
        to64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
        self.own = jax.tree.map(to64, variables["params"])
        self.prior = jax.tree.map(to64, variables["prior"])
        self.alpha = alpha

    def __call__(self, image):
        x = np.float64(image).reshape(2, 2, 2, 2, 4, 3).swapaxes(2, 3).reshape(2, -1)
        x = self.dense(x, ("stem",), lambda k: of_channels(k.reshape(-1, C)), of_rows)
        for part, norm, unroll, biases in (
            ("token_mixing", "LayerNorm_0", of_tokens, of_columns),
            ("channel_mixing", "LayerNorm_1", of_channels, of_rows),
        ):
            h = self.norm(x, ("ImlpBlock_0", norm))
            layers = [("ImlpBlock_0", part, f"Dense_{i}") for i in range(2)]
            h = gelu(self.dense(h, layers[0], unroll, biases))
            x = x + self.dense(h, layers[1], unroll, biases)
        x = self.norm(x, ("pre_head_layer_norm",))
        mean = lambda kernel: np.tile(kernel, (S, 1)) / S  # noqa: E731
        return self.dense(x, ("head",), mean, lambda bias: bias)

    def dense(self, x, path, unroll, biases):
        own, prior = at(self.own, path), at(self.prior, path)
        theirs = unroll(prior["kernel"])
        kernel = self.between(own["kernel"].reshape(theirs.shape), theirs)
        return x @ kernel + self.between(own["bias"].ravel(), biases(prior["bias"]))

    def norm(self, x, path):
        z = x.reshape(-1, S, C)
        z = z - z.mean(-1, keepdims=True)
        z = (z / np.sqrt(z.var(-1, keepdims=True) + 1e-6)).reshape(x.shape)
        own, prior = at(self.own, path), at(self.prior, path)
        scale, bias = (
            self.between(own[k].ravel(), of_rows(prior[k])) for k in ("scale", "bias")
        )
        return z * scale + bias

    def between(self, own, prior):
        return (1 - self.alpha) * own + self.alpha * prior


def of_rows(bias):
    """A bias of channels, for each token."""
    return np.tile(bias, S)


def of_columns(bias):
    """A bias of tokens, for each channel."""
    return np.repeat(bias, C)


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@DTYPES
def test_it_is_the_mlp_whose_matrices_lie_in_between(dtype, error):
    with jax.enable_x64(dtype == "float64"):
        model = model_of(0.3, dtype)
        variables = random_variables(model, dtype=dtype)
        expected = Numpy(variables, 0.3)(image(dtype))
        assert_close(logits(model, variables, dtype), expected, error)


def test_with_alpha_one_it_is_the_prior_and_with_zero_the_mlp_alone():
    """The first in float32 below, with a prior from a file."""
    with jax.enable_x64():
        only_prior, only_mlp = model_of(1.0), model_of(0.0)
        mixer = only_prior.prior
        params = random_variables(mixer)["params"]
        one, other = (random_variables(only_mlp, seed) for seed in (3, 4))
        one |= only_prior.with_prior(params)
        assert_close(logits(only_prior, one), logits(mixer, {"params": params}))
        # Whatever the prior is.
        found = logits(only_mlp, one)
        assert (found == logits(only_mlp, one | {"prior": other["prior"]})).all()
        assert_close(found, Numpy(one, 0.0)(image()))


def test_no_gradient_reaches_the_prior():
    """Of a layer, since all are weighed by the same function."""
    with jax.enable_x64():
        layer = imlp.UnitDense(0.5, Run(dtype="float64"), features=2, axis=0)
        x = jnp.asarray(np.random.default_rng(6).normal(size=(S, 2, C)))

        def loss(variables, x):
            y: Any = layer.apply(variables, x)
            return y.var()

        @jax.jit
        def gradients(x):
            variables = layer.init(jax.random.key(0), x)
            return jax.grad(loss)(variables, x)

        found = gradients(x)
        assert all((x == 0).all() for x in jax.tree.leaves(found["prior"]))
        assert all((x != 0).any() for x in jax.tree.leaves(found["params"]))


def test_too_many_units_are_refused():
    with pytest.raises(
        ValueError, match="4096 tokens of hidden_dim 3 are 12,288 units"
    ):
        models.create("imlp", **FIELDS, image_size=(128, 256))


def test_weights_of_another_resolution_are_refused():
    params = random_variables(model_of(0.5, "float32"), dtype="float32")
    weights = pretrained.Weights(
        params.pop("params"), "made here", stats=params, image_size=SIZE
    )
    with pytest.raises(ValueError, match="cannot be resized: every unit has weights"):
        pretrained.resized(weights, (8, 16), "grow")


# --- Where the prior comes from -------------------------------------------------------


def written_mixer(path, num_classes=7, names=None, seed=5):
    """A Mixer's file, and its parameters."""
    mixer = model_of(0.5, "float32").prior.clone(num_classes=num_classes)
    params = jax.device_get(random_variables(mixer, seed, "float32")["params"])
    fields = {"gelu": "tanh"}
    weights = pretrained.Weights(
        params, "made here", model=fields, image_size=SIZE, class_names=names
    )
    pretrained.write_safetensors(weights, path)
    return params


def initial(source, model, **given):
    """What a run of the model starts from."""
    variables = jax.eval_shape(model.init, jax.random.key(0), image("float32"))
    target = steps.TrainState(None, variables.pop("params"), variables, None)
    given = {"head": "match", "resize_by": "grow", "image_size": SIZE} | given
    return pretrained.initial(source, model, target, **given)


def test_a_mixer_becomes_the_prior_and_the_mlp_begins_anew(tmp_path):
    model = model_of(1.0, "float32")
    params = written_mixer(tmp_path / "mixer.safetensors")
    given = initial(tmp_path / "mixer.safetensors", model)
    assert given.keys() == {"stats"}
    own = random_variables(model, dtype="float32")["params"]
    expected = logits(model.prior, {"params": params}, "float32")
    found = logits(model, {"params": own, **given["stats"]}, "float32")
    assert_close(found, expected, 1e-5)


def test_the_priors_head_follows_the_classes_of_the_data(tmp_path):
    """By name, as a head that is trained does; for other classes it is zero."""
    names = tuple("abcdefg")
    params = written_mixer(tmp_path / "mixer.safetensors", names=names)
    model = model_of(0.5, "float32")
    given = initial(tmp_path / "mixer.safetensors", model, class_names=names[::-1])[
        "stats"
    ]
    bias = params["head"]["bias"][::-1]
    np.testing.assert_array_equal(given["prior"]["head"]["bias"], bias)
    written_mixer(tmp_path / "other.safetensors", num_classes=3)
    given = initial(tmp_path / "other.safetensors", model)["stats"]
    assert not given["prior"]["head"]["kernel"].any()
    assert given["prior"]["stem"]["kernel"].any()


def test_a_prior_of_other_sizes_is_refused(tmp_path):
    written_mixer(tmp_path / "mixer.safetensors")
    model = models.create("imlp", **FIELDS | {"tokens_mlp_dim": 6}, alpha=0.5)
    with pytest.raises(ValueError, match=r"token_mixing/Dense_0/kernel is \(4, 5\)"):
        initial(tmp_path / "mixer.safetensors", model)


def test_without_a_prior_only_alpha_zero_is_trained():
    config = recipe.load("configs/family/digits.py:imlp")
    recipe.check_fields(config)
    config.model.alpha = 0.5
    with pytest.raises(
        ValueError, match=r"alpha is 0.5, but config\.init_from names no"
    ):
        recipe.check_fields(config)
    config.init_from = "runs/mixer"
    recipe.check_fields(config)
    config.model.alpha = 1.5
    with pytest.raises(ValueError, match=r"model\.alpha is 1.5; expected .* 0 to 1"):
        recipe.check_fields(config)


@pytest.mark.slow
def test_a_run_keeps_its_prior_in_every_form(data_dir, tmp_path):
    """Trained, converted and fine-tuned from; with α = 1 it is the prior still."""
    runs = dict[str, Any]()
    for words in ("digits,prior", "digits"):
        config = recipe.load(f"configs/family/imlp.py:{words}")
        config.model.num_blocks, config.total_steps = 1, 3
        config.optim.warmup_steps = 1
        if words == "digits":
            config.init_from = str(runs["digits,prior"])
        runs[words] = tmp_path / words
        train.train(config, str(runs[words]), data_dir=data_dir)
    convert.convert(runs["digits"], tmp_path / "w.safetensors")
    prior, run, file = map(
        pretrained.read,
        (runs["digits,prior"], runs["digits"], tmp_path / "w.safetensors"),
    )
    model = pretrained.create_model(file)
    assert file.model == run.model
    assert file.model["alpha"] == 0.5
    expected = dict(leaves(model.with_prior(prior.params)))
    for weights in (run, file):
        found = dict(leaves(weights.stats))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(found[name], x, err_msg=name)
    image = jnp.asarray(
        np.random.default_rng(7).uniform(-1, 1, (2, 8, 8, 3)), "float32"
    )
    alone, _ = jax.jit(pretrained.create_model(prior).apply)(prior.variables, image)
    found, _ = jax.jit(model.clone(alpha=1.0).apply)(file.variables, image)
    assert_close(found, alone, 1e-5)
    # A later run begins with both.
    again = pretrained.initial(
        *(runs["digits"], model, steps.TrainState(None, run.params, run.stats, None)),
        image_size=(8, 8),
        head="match",
        resize_by="grow",
    )
    jax.tree.map(np.testing.assert_array_equal, again["stats"], run.stats)
    jax.tree.map(np.testing.assert_array_equal, again["params"], run.params)
