"""Any architecture on real handwritten digits: configs/digits.py with another model.

Options: one of the models below, e.g. resmlp; of an architecture of several forms also
  one form, e.g. paramixer-sym. Default: the Mixer of configs/digits.py.

Expected: 95 % top-1 or more on the 297 held-out images; docs/family.md has what each
  model reached, and the seconds that it took.
Cost: 900 steps, one to two minutes on two laptop cores.

    python -m mlp_mixer.train --config=configs/family/digits.py:resmlp
"""

from typing import Any

from mlp_mixer import recipe

# Of ParaMixer in all its forms.
_PARAMIXER: dict[str, Any] = {
    "patch_size": (2, 2),
    "num_blocks": 4,
    "hidden_dim": 64,
    "tokens_mlp_dim": 32,
    "channels_mlp_dim": 256,
}
# Of SPACH-MS in all its forms: stages of 8x8, 4x4, 2x2 tokens and one.
_SPACH_MS: dict[str, Any] = {
    "image_size": (32, 32),
    "hidden_dim": 16,
    "num_blocks": (1, 1, 2, 1),
    "stochastic_depth": 0.1,
}
# Fields of the model, and of the optimiser where Mixer's are not good enough.
MODELS: dict[str, dict[str, Any]] = {
    "resmlp": {
        "model": {
            "name": "resmlp_12",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 256,
            "stochastic_depth": 0.1,
        },
        # Without norms, and from small weights and scales, 0.003 is too slow.
        "optim": {"learning_rate": 0.01},
    },
    "gmlp": {
        "model": {
            "name": "gmlp_ti16",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 384,
        },
    },
    "smlpnet": {
        "model": {
            "name": "smlpnet_t",
            # Stages of 8x8, 4x4, 2x2 positions and one.
            "patch_size": (1, 1),
            "hidden_dim": 16,
            "num_blocks": (1, 1, 2, 2),
            "stochastic_depth": 0.1,
        },
    },
    "spach": {
        "model": {
            "name": "spach_xxs_mlp",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 128,
            "tokens_mlp_dim": 8,
        },
    },
    "spach-conv": {
        "model": {
            "name": "spach_xxs_conv",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 128,
        },
    },
    "spach-attn": {
        "model": {
            "name": "spach_xxs_attn",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 128,
            "num_heads": 2,
        },
    },
    # The MLP alone, 512 units of which each has weights to all others; with a prior:
    # configs/family/imlp.py:digits.
    "imlp": {
        "model": {
            "name": "imlp_c32",
            "patch_size": (2, 2),
            "num_blocks": 2,
            "hidden_dim": 32,
            "tokens_mlp_dim": 16,
            "channels_mlp_dim": 64,
        },
    },
    "paramixer": {"model": {**_PARAMIXER, "name": "paramixer_s16"}},
    # With half of the weights, and slower to learn.
    "paramixer-sym": {
        "model": {**_PARAMIXER, "name": "symmixer_s16"},
        "optim": {"learning_rate": 0.01},
    },
    "paramixer-asym": {
        "model": {**_PARAMIXER, "name": "asymmixer_s16", "penalty": 1e-4},
    },
    "paramixer-vanilla": {"model": {**_PARAMIXER, "name": "vanillamixer_s16"}},
    "ninformer": {
        "model": {
            "name": "ninformer_cifar",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "tokens_mlp_dim": 128,
            "channels_mlp_dim": 128,
            "dropout": 0.0,
        },
    },
    "kan_mixer": {
        "model": {
            "name": "kan_mixer_c16_h32",
            "form": "cheon",
            "patch_size": (2, 2),
            "num_blocks": 2,
            "hidden_dim": 32,
            "stochastic_depth": 0.1,
        },
    },
    "kan_mixer-canuto": {
        "model": {
            "name": "kan_mixer_c16_h32",
            "form": "canuto",
            "patch_size": (2, 2),
            "num_blocks": 2,
            "hidden_dim": 32,
            "stochastic_depth": 0.1,
        },
        "optim": {"learning_rate": 0.01},
    },
    "s2mlp": {
        "model": {
            "name": "s2mlp_wide",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 256,
            "stochastic_depth": 0.1,
        },
    },
    "s2mlp-deep": {
        "model": {
            "name": "s2mlp_deep",
            "patch_size": (2, 2),
            "num_blocks": 6,
            "hidden_dim": 64,
            "channels_mlp_dim": 256,
            "stochastic_depth": 0.1,
        },
        "optim": {"learning_rate": 0.01},
    },
    "ccs": {
        "model": {
            "name": "ccs_mixer_b16",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 256,
            "stochastic_depth": 0.1,
        },
        "optim": {"learning_rate": 0.01},
    },
    "ccs-resmlp": {
        "model": {
            "name": "ccs_resmlp_36",
            "patch_size": (2, 2),
            "num_blocks": 4,
            "hidden_dim": 64,
            "channels_mlp_dim": 256,
            "layer_scale": 0.1,
            "stochastic_depth": 0.1,
        },
        "optim": {"learning_rate": 0.01},
    },
    "cyclemlp": {
        "model": {
            "name": "cyclemlp_b1",
            "image_size": (32, 32),
            "hidden_dim": (16, 24, 32, 48),
            "num_blocks": (1, 1, 2, 1),
            "stochastic_depth": 0.1,
        },
    },
    "hiremlp": {
        "model": {
            "name": "hiremlp_tiny",
            "image_size": (32, 32),
            # Stages of 8x8, 4x4, 2x2 positions and one.
            "hidden_dim": (16, 24, 32, 48),
            "num_blocks": (1, 1, 2, 1),
            "mlp_ratio": 2,
            "stochastic_depth": 0.1,
        },
    },
    "msmlp": {
        "model": {
            "name": "msmlp_t",
            "image_size": (32, 32),
            # Stages of 8x8, 4x4, 2x2 positions and one.
            "patch_size": (4, 4),
            "hidden_dim": 10,
            "num_blocks": (1, 1, 2, 1),
            "layer_scale": 0.1,
            "stochastic_depth": 0.1,
        },
        "optim": {"learning_rate": 0.01},
    },
    "convmlp": {
        "model": {
            "name": "convmlp_s",
            # Stages of 8x8, 4x4, 2x2 positions and one.
            "image_size": (32, 32),
            "hidden_dim": (16, 24, 32, 48),
            "num_blocks": (1, 1, 2, 1),
        },
    },
    "spach_ms": {"model": {**_SPACH_MS, "name": "spach_ms_xxs_mlp"}},
    "spach_ms-conv": {"model": {**_SPACH_MS, "name": "spach_ms_xxs_conv"}},
    "spach_ms-attn": {
        "model": {**_SPACH_MS, "name": "spach_ms_xxs_attn", "num_heads": 2},
    },
    # With BatchNorm in the stem.
    "spach_ms-hybrid": {
        "model": {
            **_SPACH_MS,
            "name": "spach_ms_hybrid_s_plus",
            "num_blocks": (1, 1, 1, 1, 1, 1, 1),
            "num_heads": 2,
            "mlp_ratio": 2,
            "stem_dim": 16,
        },
    },
}


def get_config(argument: str = ""):
    """The recipe for the model in `argument`."""
    words = recipe.words(argument, [*MODELS])
    if len(words) > 1:
        raise ValueError(f"These are several models: {', '.join(words)}; name one.")
    config = recipe.load("configs/digits.py")
    for word in words:
        config.model = {"image_size": (8, 8), **MODELS[word]["model"]}
        config.optim.update(MODELS[word].get("optim", {}))
    return config
