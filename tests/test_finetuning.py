"""The whole way: pretrained at 8x8, grown to 16x16, fine-tuned, stopped, resumed."""

import jax
import pytest
from set_up import assert_equal_runs

from mlp_mixer import checkpoint, metrics, pretrained, recipe, train


@pytest.mark.slow
def test_growing_pretrained_digits_beats_training_from_scratch(
    data_dir, tmp_path, monkeypatch
):
    """On real images, in as many steps of the same recipe; and resuming is bitwise."""
    config = recipe.load("configs/digits.py")
    config.epochs = 15.0  # a quarter of the recipe's
    train.train(config, tmp_path / "pretrained", data_dir=data_dir)

    config = recipe.load("configs/finetune/digits.py")
    config.init_from = str(tmp_path / "pretrained")
    config.log_every_steps = 1
    # Two fifths of the recipe's.
    config.total_steps, config.optim.warmup_steps = 60, 10
    config.evals.test.every_steps = 12
    folders = {name: tmp_path / name for name in ("straight", "stopped", "scratch")}
    train.train(config, folders["straight"], data_dir=data_dir)

    with monkeypatch.context() as patch:
        # SIGTERM, as the loop sees it.
        asked = checkpoint.Checkpointer
        patch.setattr(asked, "stop_requested", lambda self, step: step == 28)
        state = train.train(config, folders["stopped"], data_dir=data_dir)
    assert int(state.step) == 28
    assert pretrained.read(folders["stopped"]).origin == "run at step 28"
    # What it began with is not read again.
    (tmp_path / "pretrained").rename(tmp_path / "elsewhere")
    train.train(config, folders["stopped"], data_dir=data_dir)
    assert_equal_runs(config, *map(str, (folders["straight"], folders["stopped"])))

    config.init_from = ""
    train.train(config, folders["scratch"], data_dir=data_dir)
    top1 = {
        name: {
            r["step"]: r["test/top1"] for r in metrics.read(path) if "test/top1" in r
        }
        for name, path in folders.items()
    }
    last = config.total_steps
    assert top1["straight"][last] > top1["scratch"][last] + 0.01
    # Nothing is learnt twice: before it is half-way it is where scratch ends.
    assert top1["straight"][last * 2 // 5] > top1["scratch"][last]
    shapes = jax.tree.map(lambda x: x.shape, pretrained.load(folders["straight"]))
    kernel = shapes["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"]
    assert kernel == (64, 128)
