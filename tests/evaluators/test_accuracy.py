"""Every example is counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import evaluators, sharding, steps
from mlp_mixer.data import pipeline
from mlp_mixer.models.mixer import MlpMixer

CLASSES = 8


def model():
    return MlpMixer(
        patch_size=(4, 4),
        num_blocks=1,
        hidden_dim=16,
        tokens_mlp_dim=8,
        channels_mlp_dim=64,
        num_classes=CLASSES,
    )


def random_params():
    shapes = jax.eval_shape(model().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.float32(rng.normal(size=x.shape) / 4), shapes["params"]
    )


def make(mesh, count, batch_size, loss="softmax_xent", split="test"):
    section = {
        "type": "accuracy",
        "every_steps": 1,
        "batch_size": batch_size,
        "preprocess": "vision_transformer",
        "dataset": {
            "name": "synthetic",
            "split": split,
            "num_examples": count,
            "num_classes": CLASSES,
        },
    }
    return evaluators.create(
        {"test": section},
        predict=steps.make_predict(model(), mesh),
        mesh=mesh,
        loss=loss,
        image_size=(16, 16),
        data_dir=None,
    )["test"]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("count", "batch_size"), [(64, 32), (67, 32), (67, 16), (5, 64), (67, 10)]
)
def test_every_example_is_counted_once(devices, count, batch_size):
    """Batch sizes that divide the split and those that do not, nor the devices."""
    evaluator = make(sharding.make_mesh(devices), count, batch_size)
    params = random_params()
    examples = evaluator.examples(params)
    assert sorted(examples.index) == list(range(count))
    assert evaluator.summary(examples)["count"] == count
    # Against the definition, image by image.
    source = evaluator.source
    images = np.stack([pipeline.read_image(source, i)[0] for i in range(count)])
    labels = np.array([source[i]["label"] for i in range(count)])
    apply = jax.jit(lambda x: model().apply({"params": params}, x)[0])
    logits = np.asarray(apply(steps.value_range(jnp.asarray(images))), np.float64)
    order = np.argsort(-logits, axis=-1)
    results = evaluator.run(params)
    assert results["top1"] == pytest.approx((order[:, 0] == labels).mean())
    top5 = (order[:, :5] == labels[:, None]).any(-1)
    assert results["top5"] == pytest.approx(top5.mean())
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    nll = log_sum + logits.max(-1) - logits[np.arange(count), labels]
    assert results["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    if count > 20:  # neither chance nor a constant passes the comparison above
        assert 0 < results["top1"] < results["top5"] < 1


def test_the_loss_is_the_recipes():
    params = random_params()
    mesh = sharding.make_mesh(1)
    softmax, sigmoid = (
        make(mesh, 16, 16, loss).run(params)["loss"]
        for loss in ("softmax_xent", "sigmoid_xent")
    )
    assert sigmoid > softmax + 1


def test_a_stop_ends_it_between_batches_without_a_result():
    evaluator = make(sharding.make_mesh(1), 64, 16)
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 2

    assert evaluator.run(random_params(), stop) is None
    assert len(asked) == 3


def test_broken_images_are_left_out_and_counted(monkeypatch):
    evaluator = make(sharding.make_mesh(8), 20, 8)
    read = pipeline.read_image

    def fragile(source, index, dct="fast"):
        if index in (3, 19):
            raise ValueError("truncated")
        return read(source, index, dct)

    monkeypatch.setattr(pipeline, "read_image", fragile)
    params = random_params()
    results = evaluator.run(params)
    assert (results["count"], results["broken"]) == (18, 2)
    monkeypatch.setattr(pipeline, "read_image", read)
    assert "broken" not in evaluator.run(params)


def test_an_unknown_type_lists_the_known():
    with pytest.raises(ValueError, match=r"evals\.x\.type 'acuracy'.*try accuracy"):
        evaluators.create({"x": {"type": "acuracy"}})
