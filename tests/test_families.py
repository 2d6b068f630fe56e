"""Laws that every architecture keeps. A new one adds a row to `FACTS`, no test."""

import dataclasses
import functools
import json
import pathlib
import re

import family
import flax.errors
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from golden import record_timm
from safetensors.numpy import load_file
from set_up import told

from mlp_mixer import (
    checkpoint,
    convert,
    evaluate,
    export,
    metrics,
    models,
    predict,
    pretrained,
    recipe,
    train,
)
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models import Run
from mlp_mixer.models.model import axes_by_form, form_of
from mlp_mixer.planning import counts
from mlp_mixer.pretrained import foreign
from mlp_mixer.pretrained.foreign import Names

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


@dataclasses.dataclass
class Facts:
    """What is known of an architecture from elsewhere.

    Attributes:
      counts: size → number of parameters, for the images and classes of `COUNTED`.
      initial: parameter → mean and standard deviation of its initial values, in the
        first size.
      gmacs: size → billions of multiply-adds of an image, norms included, as fvcore
        counts the authors' code, or as the paper says with a digit behind the point.
    """

    counts: dict[str, int]
    initial: dict[str, tuple[float, float]]
    gmacs: dict[str, float] = dataclasses.field(default_factory=dict)


FACTS = {
    "mixer": Facts(
        # The counts of B/32, B/16 and L/16 are also in the official code's own test
        # (vit_jax/models_test.py).
        {
            "mixer_s32": 19_104_624,
            "mixer_s16": 18_528_264,
            "mixer_b32": 60_293_428,
            "mixer_b16": 59_880_472,
            "mixer_l32": 206_939_264,
            "mixer_l16": 208_196_168,
            "mixer_h14": 432_350_952,
        },
        # Flax's Dense.
        {"MixerBlock_0/token_mixing/Dense_0/kernel": (0, 49**-0.5)},
    ),
    "resmlp": Facts(
        # timm's counts.
        {
            "resmlp_12": 15_350_872,
            "resmlp_24": 30_020_680,
            "resmlp_36": 44_690_488,
            "resmlp_big_24": 129_138_280,
        },
        # The authors' resmlp_models.py; its stem is torch's convolution.
        {
            "stem/kernel": (0, (3 * 768) ** -0.5),
            "stem/bias": (0, (3 * 768) ** -0.5),
            "ResMlpBlock_0/Affine_0/alpha": (1, 0),
            "ResMlpBlock_0/token_mixing/kernel": (0, 0.02),
            "ResMlpBlock_0/scale_0": (0.1, 0),
            "ResMlpBlock_0/channel_mixing/Dense_1/kernel": (0, 0.02),
            "ResMlpBlock_0/scale_1": (0.1, 0),
            "head/kernel": (0, 0.02),
        },
        {
            "resmlp_12": 3.010,
            "resmlp_24": 5.961,
            "resmlp_36": 8.913,
            "resmlp_big_24": 100.2,
        },
    ),
    "gmlp": Facts(
        # timm's counts and initial values.
        {"gmlp_ti16": 5_867_328, "gmlp_s16": 19_422_656, "gmlp_b16": 73_075_392},
        {
            "stem/bias": (0, 0),
            "GMlpBlock_0/Dense_0/kernel": (0, (2 / (128 + 768)) ** 0.5),
            "GMlpBlock_0/Dense_0/bias": (0, 1e-6),
            "GMlpBlock_0/gating/Dense_0/kernel": (0, 1e-6),
            "GMlpBlock_0/gating/Dense_0/bias": (1, 0),
            "head/kernel": (0, 0),
        },
        {"gmlp_ti16": 1.344, "gmlp_s16": 4.422, "gmlp_b16": 15.781},
    ),
    "smlpnet": Facts(
        # Of the authors' code; in the paper's table 24.1, 48.6, 65.9 and 19.2 million.
        {
            "smlpnet_t": 24_123_584,
            "smlpnet_s": 48_558_136,
            "smlpnet_b": 65_880_408,
            "smlpnet_t_star": 19_175_584,
        },
        # torch's: uniform in ±1/√fan_in.
        {
            "stem/kernel": (0, (3 * 48) ** -0.5),
            "stage0_block_0/BatchNorm_0/scale": (1, 0),
            "stage0_block_0/depthwise/kernel": (0, (3 * 9) ** -0.5),
            "stage0_block_0/mix_w/kernel": (0, (3 * 56) ** -0.5),
            "stage0_block_0/mix_w/bias": (0, (3 * 56) ** -0.5),
            "stage0_block_0/mix_h/kernel": (0, (3 * 56) ** -0.5),
            "stage0_block_0/fuse/kernel": (0, (3 * 240) ** -0.5),
            "stage0_block_0/Dense_0/kernel": (0, (3 * 80) ** -0.5),
            "stage0_block_0/Dense_1/kernel": (0, (3 * 240) ** -0.5),
            "stage0_block_0/Dense_1/bias": (0, (3 * 240) ** -0.5),
            "down3/kernel": (0, (3 * 4 * 320) ** -0.5),
            "head/kernel": (0, (3 * 640) ** -0.5),
            "head/bias": (0, (3 * 640) ** -0.5),
        },
        {
            "smlpnet_t": 5.012,
            "smlpnet_s": 10.348,
            "smlpnet_b": 14.028,
            "smlpnet_t_star": 3.968,
        },
    ),
    "paramixer": Facts(
        # The authors' models, which they train on CIFAR-10; sizes that repeat blocks
        # have no more parameters.
        {
            "paramixer_s32": 18_958_858,
            "paramixer_s16": 19_585_546,
            "paramixer_b16": 62_641_930,
            "paramixer_l16": 216_577_034,
            "paramixer_s16_ni2": 19_585_546,
            "paramixer_s16_ni3": 19_585_546,
            "paramixer_s16_ni4": 19_585_546,
            "symmixer_s32": 10_469_898,
            "symmixer_s16": 10_795_530,
            "symmixer_b16": 33_427_210,
            "symmixer_l16": 113_505_290,
            "symmixer_s16_ni2": 10_795_530,
            "symmixer_s16_ni3": 10_795_530,
            "symmixer_s16_ni4": 10_795_530,
            "asymmixer_s16": 19_585_546,
            "vanillamixer_s32": 19_360_266,
            "vanillamixer_s16": 21_191_178,
            "vanillamixer_b16": 66_254_602,
            "vanillamixer_l16": 226_210_826,
            "vanillamixer_s16_ni2": 21_191_178,
            "vanillamixer_s16_ni3": 21_191_178,
            "vanillamixer_s16_ni4": 21_191_178,
        },
        {
            "stem/kernel": (0, (3 * 32**2) ** -0.5),
            "stem/bias": (0, 0),
            "ParaMixerBlock_0/LayerNorm_0/scale": (1, 0),
            "ParaMixerBlock_0/LayerNorm_0/bias": (0, 0),
            # Xavier's.
            "ParaMixerBlock_0/token_mixing/Dense_0/kernel": (0, (2 / 305) ** 0.5),
            "ParaMixerBlock_0/channel_mixing/Dense_1/kernel": (0, (2 / 2560) ** 0.5),
            "head/kernel": (0, 0),
        },
        {
            "paramixer_s32": 1.004,
            "paramixer_s16": 3.785,
            "paramixer_b16": 12.62,
            "paramixer_l16": 44.60,
            "symmixer_s32": 1.004,
            "symmixer_s16": 3.785,
            "symmixer_b16": 12.62,
            "symmixer_l16": 44.60,
            # AsymMixer's 5.635 has three products where ours has two.
        },
    ),
    "ninformer": Facts(
        # The authors' model for CIFAR-10.
        {"ninformer_cifar": 2_652_170},
        # torch's: uniform in ±1/√fan_in.
        {
            "stem/kernel": (0, (3 * 48) ** -0.5),
            "stem/bias": (0, (3 * 48) ** -0.5),
            "NiNBlock_0/gate/kernel": (0, (3 * 256) ** -0.5),
            "NiNBlock_0/gate/bias": (0, (3 * 256) ** -0.5),
            "NiNBlock_0/MixerBlock_0/token_mixing/Dense_0/kernel": (0, 192**-0.5),
            "NiNBlock_0/MixerBlock_0/token_mixing/Dense_0/bias": (0, 192**-0.5),
            "NiNBlock_0/channel_mixing/Dense_1/kernel": (0, (3 * 512) ** -0.5),
            "head/kernel": (0, (3 * 256) ** -0.5),
            "head/bias": (0, (3 * 256) ** -0.5),
        },
        {"ninformer_cifar": 0.220},
    ),
    "kan_mixer": Facts(
        # The authors' models for CIFAR-10.
        {
            "kan_mixer_c16_h32": 392_640,
            "kan_mixer_c32_h64": 826_240,
            "kan_mixer_c64_h128": 1_816_320,
        },
        # torch's: uniform in ±1/√fan_in; and splines that are small noise.
        {
            "stem/kernel": (0, (3 * 12) ** -0.5),
            "stem/scale": (0, (3 * 12) ** -0.5),
            "KanMixerBlock_0/TokenChannelNorm_0/scale": (1, 0),
            "KanMixerBlock_0/token_mixing_0/kernel": (0, (3 * 256) ** -0.5),
            "KanMixerBlock_0/token_mixing_1/scale": (0, (3 * 32) ** -0.5),
            "KanMixerBlock_0/token_mixing_0/spline": (0, 0.008806),
            "head/kernel": (0, (3 * 16) ** -0.5),
            "head/scale": (0, (3 * 16) ** -0.5),
        },
        {
            "kan_mixer_c32_h64": 0.039,
            "kan_mixer_c64_h128": 0.153,
        },
    ),
    "spach": Facts(
        # Of the authors' code.
        {
            "spach_xxs_mlp": 8_307_184,
            "spach_xs_mlp": 15_932_536,
            "spach_s_mlp": 39_820_024,
            "spach_xxs_conv": 7_828_840,
            "spach_xs_conv": 14_975_848,
            "spach_s_conv": 38_854_120,
            "spach_xxs_attn": 3_931_048,
            "spach_xs_attn": 14_938_984,
            "spach_s_attn": 32_507_368,
        },
        # Kaiming's over the fan-out, Xavier's, and zeros, as its initialiser ends up.
        {
            "stem/kernel": (0, (2 / (256 * 384)) ** 0.5),
            "stem/bias": (0, 0),
            "SpachBlock_0/depthwise/kernel": (0, (2 / (9 * 384)) ** 0.5),
            "SpachBlock_0/depthwise/bias": (0, 0),
            "SpachBlock_0/scale": (1e-4, 0),
            "SpachBlock_0/token_mixing/Dense_0/kernel": (0, (2 / (196 + 98)) ** 0.5),
            "SpachBlock_0/token_mixing/Dense_0/bias": (0, 0),
            "SpachBlock_0/channel_mixing/Dense_1/kernel": (0, (2 / (3 * 384)) ** 0.5),
            "head/kernel": (0, 0),
        },
        {
            "spach_xxs_mlp": 1.640,
            "spach_xs_mlp": 3.222,
            "spach_s_mlp": 7.995,
            "spach_xxs_conv": 1.459,
            "spach_xs_conv": 2.859,
            "spach_s_conv": 7.511,
            "spach_xxs_attn": 0.909,
            "spach_xs_attn": 3.205,
            "spach_s_attn": 6.739,
        },
    ),
    "imlp": Facts(
        # 3072 pixels to 2048 units; in each of 4 layers to 16·32 and back, to 64·32 and
        # back, and two norms; a norm; 10 classes. The paper has no counts.
        {
            "imlp_c32": 3073 * 2048
            + 4 * (2049 * 512 + 513 * 2048 + 2 * 2049 * 2048 + 4 * 2048)
            + 2 * 2048
            + 2049 * 10
        },
        # Ours: those of Flax's Dense.
        {
            "stem/kernel": (0, 3072**-0.5),
            "ImlpBlock_0/LayerNorm_0/scale": (1, 0),
            "ImlpBlock_0/token_mixing/Dense_0/kernel": (0, 2048**-0.5),
            "ImlpBlock_0/token_mixing/Dense_1/kernel": (0, 512**-0.5),
            "ImlpBlock_0/channel_mixing/Dense_0/bias": (0, 0),
            "head/kernel": (0, 0),
        },
    ),
    "s2mlp": Facts(
        # N (2 (C² + C) + 8 C² + 5 C) + 768 C + C, of which the papers' 71 and 51 (Mi),
        # 2 N + 1 norms of 2 C, and a head of 1000 C + 1000.
        {
            "s2mlp_wide": 71_433_984 + 25 * 1536 + 769_000,
            "s2mlp_deep": 53_476_224 + 73 * 768 + 385_000,
        },
        # Not the paper's, which has none: ResMLP's.
        {
            "stem_norm/scale": (1, 0),
            "S2MlpBlock_0/token_mixing/Dense_0/kernel": (0, 0.02),
            "S2MlpBlock_0/token_mixing/Dense_1/bias": (0, 0),
            "S2MlpBlock_0/channel_norm/bias": (0, 0),
        },
        {"s2mlp_wide": 14.0, "s2mlp_deep": 10.5},
    ),
    "ccs": Facts(
        # The base's without token mixing, and G·S in each layer; a head.
        {
            "ccs_mixer_b16": 57_316_992 + 769_000,
            "ccs_resmlp_36": 42_971_904 + 385_000,
            "ccs_resmlp_36_g1": 42_922_512 + 385_000,
            "ccs_resmlp_36_g4": 42_943_680 + 385_000,
            "ccs_resmlp_36_g384": 45_624_960 + 385_000,
        },
        # torch's Linear(S, G): uniform in ±1/√S.
        {"MixerBlock_0/token_mixing/kernel": (0, (3 * 196) ** -0.5)},
    ),
    "cyclemlp": Facts(
        # Of the authors' code.
        {
            "cyclemlp_b1": 15_155_400,
            "cyclemlp_b2": 26_802_504,
            "cyclemlp_b3": 38_385_720,
            "cyclemlp_b4": 51_796_552,
            "cyclemlp_b5": 75_747_280,
        },
        # Its convolutions begin as torch's, uniform in ±1/√fan_in.
        {
            "stem/kernel": (0, (3 * 49 * 3) ** -0.5),
            "stem/bias": (0, (3 * 49 * 3) ** -0.5),
            "stage0_block_0/LayerNorm_0/scale": (1, 0),
            "stage0_block_0/cycle_w/kernel": (0, 0.02),
            "stage0_block_0/cycle_h/bias": (0, 0),
            "stage0_block_0/linear_c/kernel": (0, 0.02),
            "stage0_block_0/fusion/Dense_1/kernel": (0, 0.02),
            "stage0_block_0/fusion/proj/kernel": (0, 0.02),
            "stage0_block_0/channel_mixing/Dense_0/kernel": (0, 0.02),
            "down3/kernel": (0, (3 * 9 * 320) ** -0.5),
            "head/kernel": (0, 0.02),
            "head/bias": (0, 0),
        },
        {
            "cyclemlp_b1": 2.1,
            "cyclemlp_b2": 3.9,
            "cyclemlp_b3": 6.9,
            "cyclemlp_b4": 10.1,
            "cyclemlp_b5": 12.3,
        },
    ),
    "hiremlp": Facts(
        # Of the authors' code; in the paper's table 18, 33, 58 and 96 million.
        {
            "hiremlp_tiny": 18_041_672,
            "hiremlp_small": 33_113_848,
            "hiremlp_base": 58_226_856,
            "hiremlp_large": 95_723_944,
        },
        # Every kernel of it, convolutions too.
        {
            "stem/Convolution_0/kernel": (0, 0.02),
            "stem/Convolution_0/bias": (0, 0),
            "stem/BatchNorm_0/scale": (1, 0),
            "stage0_block_0/mlp_h/Dense_0/kernel": (0, 0.02),
            "stage0_block_0/mlp_w/Dense_1/kernel": (0, 0.02),
            "stage0_block_0/mlp_w/Dense_1/bias": (0, 0),
            "stage0_block_0/mlp_c/kernel": (0, 0.02),
            "stage0_block_0/fusion/Dense_1/kernel": (0, 0.02),
            "stage0_block_0/channel_mixing/Dense_0/kernel": (0, 0.02),
            "down3/Convolution_0/kernel": (0, 0.02),
            "head/kernel": (0, 0.02),
            "head/bias": (0, 0),
        },
        {
            "hiremlp_tiny": 2.149,
            "hiremlp_small": 4.240,
            "hiremlp_base": 8.125,
            "hiremlp_large": 13.442,
        },
    ),
    "msmlp": Facts(
        # Of the authors' code; in the paper's table 28, 50 and 88 million.
        {"msmlp_t": 28_656_232, "msmlp_s": 50_303_752, "msmlp_b": 88_696_792},
        # torch's for convolutions, N(0, 0.02) for what are Linears there.
        {
            "stem/proj/kernel": (0, (3 * 48) ** -0.5),
            "stem/proj/bias": (0, (3 * 48) ** -0.5),
            "stem/norm/scale": (1, 0),
            "stage0_block_0/mix_shift/w_4/kernel": (0, (3 * 49) ** -0.5),
            "stage3_block_0/mix_shift/h_1/bias": (0, (3 * 49) ** -0.5),
            "stage0_block_0/LayerNorm_0/bias": (0, 0),
            "stage0_block_0/channel_mixing/Dense_0/kernel": (0, 0.02),
            "stage0_block_0/channel_mixing/Dense_1/bias": (0, 0),
            "stage0_block_0/scale": (1e-6, 0),
            "down1/proj/kernel": (0, (3 * 4 * 96) ** -0.5),
            "norm/scale": (1, 0),
            "head/kernel": (0, 0.02),
            "head/bias": (0, 0),
        },
        gmacs={"msmlp_t": 4.451, "msmlp_s": 8.687, "msmlp_b": 15.361},
    ),
    "convmlp": Facts(
        # Of the authors' code; in the paper's table 9.0, 17.4 and 42.7 million.
        {
            "convmlp_s": 9_022_920,
            "convmlp_m": 17_410_504,
            "convmlp_l": 42_728_440,
        },
        # Convolutions have Kaiming's over the fan-out, and torch's biases; linear maps
        # a normal of 0.02.
        {
            "stem/Convolution_0/kernel": (0, (2 / (9 * 32)) ** 0.5),
            "stem/BatchNorm_2/scale": (1, 0),
            "stage0_block_0/Dense_0/kernel": (0, (2 / 128) ** 0.5),
            "stage0_block_0/Convolution_0/kernel": (0, (2 / (9 * 128)) ** 0.5),
            "stage0_block_0/Dense_1/kernel": (0, (2 / 64) ** 0.5),
            "down1/kernel": (0, (2 / (9 * 128)) ** 0.5),
            "down1/bias": (0, (3 * 9 * 64) ** -0.5),
            "stage1_block_0/channel_mixing_0/Dense_0/kernel": (0, 0.02),
            "stage1_block_0/channel_mixing_1/Dense_1/bias": (0, 0),
            "stage1_block_0/depthwise/kernel": (0, (2 / (9 * 128)) ** 0.5),
            "down3/bias": (0, (3 * 9 * 256) ** -0.5),
            "head/kernel": (0, 0.02),
            "head/bias": (0, 0),
        },
        {"convmlp_s": 2.399, "convmlp_m": 3.948, "convmlp_l": 9.904},
    ),
    "spach_ms": Facts(
        # Of the authors' code.
        {
            "spach_ms_xxs_mlp": 6_562_446,
            "spach_ms_xs_mlp": 20_260_283,
            "spach_ms_s_mlp": 46_542_011,
            "spach_ms_xxs_conv": 5_085_224,
            "spach_ms_xs_conv": 17_302_120,
            "spach_ms_s_conv": 43_576_168,
            "spach_ms_xxs_attn": 2_372_744,
            "spach_ms_xs_attn": 14_479_080,
            "spach_ms_s_attn": 39_537_544,
            "spach_ms_hybrid_xs": 27_956_584,
            "spach_ms_hybrid_s": 63_028_584,
            "spach_ms_hybrid_s_plus": 63_138_728,
        },
        # As SPACH's.
        {
            "stem/kernel": (0, (2 / (16 * 64)) ** 0.5),
            "stem/bias": (0, 0),
            "stage0_conv_0/depthwise/kernel": (0, (2 / (9 * 64)) ** 0.5),
            "stage1_mlp_0/scale": (1e-4, 0),
            "stage1_mlp_0/token_mixing/Dense_0/kernel": (0, (2 / (784 + 392)) ** 0.5),
            "stage3_mlp_0/channel_mixing/Dense_1/kernel": (0, (2 / (3 * 512)) ** 0.5),
            "stage3_mlp_0/channel_mixing/Dense_1/bias": (0, 0),
            "down1/conv/kernel": (0, (2 / (4 * 128)) ** 0.5),
            "down1/norm/scale": (1, 0),
            "head/kernel": (0, 0),
        },
        gmacs={
            **{"spach_ms_xxs_mlp": 0.941, "spach_ms_xs_mlp": 3.433},
            **{"spach_ms_s_mlp": 8.045, "spach_ms_xxs_conv": 0.719},
            **{"spach_ms_xs_conv": 2.770, "spach_ms_s_conv": 7.162},
            **{"spach_ms_xxs_attn": 0.535, "spach_ms_xs_attn": 3.098},
            **{"spach_ms_s_attn": 7.556, "spach_ms_hybrid_xs": 4.464},
            **{"spach_ms_hybrid_s": 11.079, "spach_ms_hybrid_s_plus": 12.210},
        },
    ),
}
SIZES = [(name, size) for name, facts in FACTS.items() for size in facts.counts]
every_size = pytest.mark.parametrize(("name", "size"), SIZES)

# Those whose four stages take long to compile.
PYRAMIDS = ("cyclemlp", "hiremlp", "msmlp", "convmlp", "spach_ms")


def slow_unless(quick):
    """All architectures; the quick suite does those of which `quick` is true."""
    return [
        pytest.param(name, marks=[] if quick(name) else [pytest.mark.slow])
        for name in FACTS
    ]


every_family = pytest.mark.parametrize("name", FACTS)
ISOTROPIC_FIRST = slow_unless(lambda name: name not in PYRAMIDS)
# Of what takes long for all, the quick suite does the Mixer's.
MIXER_FIRST = slow_unless(lambda name: name == "mixer")
RNGS = {"dropout": jax.random.key(7)}


# Words of the digits' recipe: an architecture, or one form of it.
WORDS = [
    "mixer",
    *recipe.run_file(f"{ROOT}/configs/family/digits.py")["MODELS"],
]


def digits(word):
    """The recipe that trains a small one on the digits."""
    return recipe.load(f"configs/family/digits.py:{word if word != 'mixer' else ''}")


def shallow(name):
    """The same with fewer blocks, for what each block costs is compiling."""
    config = digits(name)
    blocks = config.model.num_blocks
    few = 2 if isinstance(blocks, int) else (1,) * (len(blocks) - 1) + (2,)
    config.model.num_blocks = few
    return config


def shapes(model, size=(224, 224)):
    image = jnp.zeros((1, *size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), image)


@functools.cache
def small(name, **fields):
    """The model of the digits' recipe, with noise."""
    model = shallow(name).model.to_dict()
    fields = {"num_classes": 10, "stochastic_depth": 0.5} | fields
    return models.create(**model | fields)


def image_size(name):
    """Of the digits' recipe."""
    return digits(name).model.image_size


def images(name, n=8):
    shape = (n, *image_size(name), 3)
    return jax.random.uniform(jax.random.key(1), shape, minval=-1)


@functools.cache
def variables(name):
    """Of `small`; all parameters are random, so that nothing hides behind a zero."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.5
        noise = spread * rng.normal(size=leaf.shape)
        if path[-1].key == "var":
            return jnp.float32(np.exp(noise))
        return jnp.float32(noise + (path[-1].key in ("scale", "alpha")))

    return jax.tree_util.tree_map_with_path(draw, shapes(small(name), image_size(name)))


def test_all_families_have_facts():
    assert set(models.families()) == set(FACTS)
    assert models.names() == [size for _, size in SIZES]


@every_size
def test_parameters_and_multiply_adds_are_as_many_as_the_papers(name, size):
    found = family.cost(size)
    assert found.parameters == FACTS[name].counts[size]
    if size in FACTS[name].gmacs:
        expected, gmacs = FACTS[name].gmacs[size], (found.macs + found.norms) / 1e9
        rounded = round(gmacs, 1) == expected  # as papers have it
        assert rounded or gmacs == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "size", ["mixer_s32", pytest.param("smlpnet_t", marks=pytest.mark.slow)]
)
def test_a_block_of_each_row_tells_what_all_of_them_cost(size):
    """Of a model with as many blocks as it has."""
    side, classes = models.counted(size)
    model = models.create(size, num_classes=classes)
    given, image = shapes(model), jnp.zeros((1, side, side, 3))
    found = family.cost(size)
    parameters = (x.size for x in jax.tree.leaves(given["params"]))
    assert found.parameters == sum(parameters)
    assert found.macs == counts.flops(jax.make_jaxpr(model.apply)(given, image)) // 2


@every_size
def test_axes_name_every_axis_of_every_parameter(name, size):
    """And a letter stands for one number, in all parameters of the model."""
    params = family.shapes_of_one_block_each(size)["params"]
    file, found = models.family(name), {"rgb": 3, "k": models.counted(size)[1]}
    axes = axes_by_form(file)[form_of(file, models.fields(size))]
    used = set()
    for path, leaf in leaves(params):
        pattern = re.sub(r"^([^/]*_)[0-9]+/", r"\1*/", path)
        used.add(pattern)
        assert leaf.ndim == len(axes[pattern].split())
        for letter, length in zip(axes[pattern].split(), leaf.shape, strict=True):
            assert found.setdefault(letter, length) == length, (path, letter)
    assert used == set(axes)


@pytest.mark.parametrize("name", MIXER_FIRST)
def test_initial_values_are_the_papers(name):
    size = next(iter(FACTS[name].counts))
    side, _ = models.counted(size)
    image = jnp.zeros((1, side, side, 3))
    init = jax.jit(family.one_block_each(size).init)
    params = dict(leaves(init(jax.random.key(3), image)))
    for path, (mean, spread) in FACTS[name].initial.items():
        x = np.asarray(params[f"params/{path}"], np.float64)
        assert x.mean() == pytest.approx(mean, rel=1e-6, abs=5 * spread / x.size**0.5)
        assert x.std() == pytest.approx(spread, rel=3 / x.size**0.5, abs=1e-8)


@pytest.mark.parametrize("name", ISOTROPIC_FIRST)
def test_the_forward_keeps_the_contract(name):
    model, given = small(name), variables(name)
    logits, out = jax.jit(model.apply)(given, images(name))
    assert logits.shape == (8, 10)
    assert logits.dtype == out["pre_logits"].dtype == jnp.float32
    assert all(x.shape[0] == 8 for x in out.values())
    assert logits.std() > 0.1
    head = given["params"]["head"]
    if {*head} == {"kernel", "bias"}:  # is linear in the features
        expected = out["pre_logits"] @ head["kernel"] + head["bias"][None]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    # Without classes the first result are the features.
    features, _ = jax.jit(small(name, num_classes=None).apply)(
        given | {"params": {k: v for k, v in given["params"].items() if k != "head"}},
        images(name),
    )
    np.testing.assert_array_equal(features, out["pre_logits"])


@every_family
def test_an_image_that_does_not_fit_is_refused(name):
    """Any other grid does not, where a parameter is tied to the resolution."""
    model, given = small(name), variables(name)
    h, w = image_size(name)
    with pytest.raises(ValueError, match="not divisible"):
        model.apply(given, jnp.zeros((1, h, w + 1, 3)))
    larger = jnp.zeros((1, 2 * h, 2 * w, 3))
    if shapes(model, (2 * h, 2 * w)) == shapes(model, (h, w)):
        assert jax.eval_shape(model.apply, given, larger)[0].shape == (1, 10)
        return
    with pytest.raises(ValueError, match="training resol"):
        model.apply(given, larger)


@pytest.mark.parametrize("name", MIXER_FIRST)
def test_bfloat16_differs_by_its_rounding(name):
    exact, _ = jax.jit(small(name).apply)(variables(name), images(name))
    model = small(name, run=Run("bfloat16"))
    found, out = jax.jit(model.apply)(variables(name), images(name))
    assert out["stem"].dtype == jnp.bfloat16
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", ISOTROPIC_FIRST)
def test_stochastic_depth_leaves_out_whole_branches_of_some_images(name):
    model = small(name)

    def without(path, leaf):  # SPACH has a convolution that is never left out
        return 0 * leaf if "depthwise" in str(path) else leaf

    _, out = jax.jit(
        functools.partial(model.apply, train=True, mutable=["batch_stats"])
    )(
        jax.tree_util.tree_map_with_path(without, variables(name)),
        images(name, 64),
        rngs=RNGS,
    )[0]
    blocks = [k for k in out if k.startswith("block_")]
    before, after = (out[k].reshape(64, -1) for k in blocks[-2:])
    if name == "convmlp":  # whose depthwise convolution nothing passes by
        before = 0 * before
    still = (before == after).all(1)
    assert 0 < still.sum() < 64


@every_family
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_model_says_whether_its_training_draws_noise(name, rate):
    model = small(name, stochastic_depth=rate)
    assert model.draws_noise == bool(rate)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    without_a_key = functools.partial(
        jax.eval_shape, train, variables(name), images(name)
    )
    if rate:
        with pytest.raises(flax.errors.InvalidRngError):
            without_a_key()
    else:
        without_a_key()


def on_one_cpu():
    """A mesh on which products are of true matrices."""
    return jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])


RUNS = (
    Run(scan=True),
    Run(remat="pre_gelu"),
    Run(scan=True, remat="full", mesh=on_one_cpu()),
)


def gradients(name, run):
    """Loss and statistics, and gradients, of training with noise."""
    model, given = small(name, run=run), variables(name)
    weights = jnp.sin(jnp.arange(80.0)).reshape(8, 10)

    def loss(given):
        (logits, _), stats = model.apply(
            given, images(name), train=True, rngs=RNGS, mutable=["batch_stats"]
        )
        return (weights * logits).sum(), stats

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(given)


@pytest.mark.parametrize("name", MIXER_FIRST)
def test_no_way_to_compute_it_moves_a_gradient_or_a_statistic(name):
    expected = gradients(name, Run())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for run in RUNS[2:] if name in PYRAMIDS else RUNS:  # each takes long to compile
        found = gradients(name, run)
        for (path, a), (_, b) in zip(leaves(found), leaves(expected), strict=True):
            np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-6 * largest, err_msg=path
            )


# --- Against timm ---------------------------------------------------------------------

RECORDED = sorted(path.stem for path in GOLDEN.glob("timm_*.safetensors"))


@pytest.mark.parametrize("recorded", RECORDED)
def test_a_file_of_timms_computes_what_timm_computed(recorded, tmp_path):
    path = GOLDEN / f"{recorded}.safetensors"
    weights = pretrained.read(path, mean=0.5, std=0.5)
    model = pretrained.create_model(weights)
    with np.load(GOLDEN / f"{recorded}.npz") as golden:
        logits, out = jax.jit(model.apply)(weights.variables, golden["image"])
        assert np.abs(golden["logits"]).max() > 0.5
        np.testing.assert_allclose(logits, golden["logits"], atol=3e-6, rtol=0)
        expected = golden["pre_logits"]
        np.testing.assert_allclose(out["pre_logits"], expected, atol=3e-6, rtol=0)
    # And goes back to what it was.
    pretrained.write_safetensors(weights, tmp_path / "t.safetensors", names="timm")
    ours, theirs = map(load_file, (tmp_path / "t.safetensors", path))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


# --- Against the authors' code --------------------------------------------------------

AUTHORS = sorted(path.stem for path in GOLDEN.glob("authors_*.npz"))


def authors_recording(recorded):
    with np.load(GOLDEN / f"{recorded}.npz") as golden:
        return dict(golden)


# Of a pyramid, which takes long to compile, the quick suite reads the files alone.
SLOW = tuple(f"authors_{name}" for name in ("smlpnet", *PYRAMIDS))
# Of models with BatchNorm there are also three steps of training.
WITH_STATISTICS = [x for x in AUTHORS if "rate" in authors_recording(x)]


@pytest.mark.parametrize(
    "recorded",
    [
        pytest.param(x, marks=[pytest.mark.slow] if x.startswith(SLOW) else [])
        for x in AUTHORS
    ],
)
def test_a_file_of_the_authors_computes_what_their_code_computed(recorded, tmp_path):
    path = GOLDEN / f"{recorded}.safetensors"
    golden = authors_recording(recorded)
    fields = json.loads(str(golden["model"]))
    image, expected = golden["image"], golden["logits"]
    # Names and shapes tell the architecture; what no shape tells is recorded.
    family = fields.pop("name")
    weights = pretrained.read(path, mean=0.5, std=0.5, model=fields)
    assert weights.architecture is models.family(family)
    # And it becomes one for our images, whatever its authors normalise by.
    assert pretrained.read(path, model=fields).num_classes == weights.num_classes
    model = pretrained.create_model(weights)
    logits, _ = jax.jit(model.apply)(weights.variables, image)
    assert np.abs(expected).max() > 0.2
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    # And goes back to what it was, buffers too, as torch's strict loading wants it.
    pretrained.write_safetensors(weights, tmp_path / "t.safetensors", names="authors")
    ours, theirs = map(load_file, (tmp_path / "t.safetensors", path))
    counts = {name for name in theirs if name.endswith("num_batches_tracked")}
    assert ours.keys() == theirs.keys() - counts
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", WITH_STATISTICS)
def test_three_steps_of_training_move_statistics_as_the_authors_code_does(recorded):
    """And parameters, which the logits show."""
    recording = authors_recording(recorded)
    fields = json.loads(str(recording["model"]))
    fields = {k: x for k, x in fields.items() if k != "name"}
    path = GOLDEN / f"{recorded}.safetensors"
    weights = pretrained.read(path, mean=0.5, std=0.5, model=fields)
    model = pretrained.create_model(weights)
    image, labels, rate = (
        jnp.asarray(recording[x]) for x in ("image", "labels", "rate")
    )

    @jax.jit
    def step(params, stats):
        def loss(params):
            (logits, _), after = model.apply(
                {"params": params, **stats}, image, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), after

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        new = jax.tree.map(lambda x, g: x - rate.astype(x.dtype) * g, params, gradients)
        return new, stats

    params, stats = weights.params, weights.stats
    for _ in range(3):
        params, stats = step(params, stats)
    names = foreign.names_of(weights.architecture, "authors", weights.model)
    found = names.with_their_names({k: np.asarray(x) for k, x in leaves(stats)})
    expected = {
        name.removeprefix("after/"): array
        for name, array in recording.items()
        if name.startswith("after/")
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(
            found[name], array, rtol=1e-5, atol=1e-6, err_msg=name
        )
    logits, _ = jax.jit(model.apply)({"params": params, **stats}, image)
    before, after = recording["logits"], recording["logits_after"]
    assert np.abs(after - before).max() > 0.2
    np.testing.assert_allclose(logits, after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recorded", RECORDED)
def test_a_published_size_computes_what_timm_computed(recorded):
    """Both sides make the parameters themselves, from timm's names and shapes."""
    with np.load(GOLDEN / f"{recorded}.npz") as golden:
        size, expected = str(golden["seeded"]), golden["seeded_logits"]
    model = models.create(size.removesuffix("_224"), num_classes=1000, gelu="exact")
    names = Names(models.family(size.removesuffix("_224")), "timm")
    zeros = {k: np.broadcast_to(0, x.shape) for k, x in leaves(shapes(model)["params"])}
    named = {k: x.shape for k, x in names.with_their_names(zeros).items()}
    params = unflatten_dict(names.with_our_names(record_timm.seeded(named)), sep="/")
    image = record_timm.seeded_image(224, 224)
    logits, _ = jax.jit(model.apply)({"params": params}, image)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


# --- The programs ---------------------------------------------------------------------


def stopping_after(monkeypatch, step):
    """Makes the next run stop as by a signal once `step` is done."""
    monkeypatch.setattr(
        checkpoint.Checkpointer, "stop_requested", lambda self, now: now >= step
    )


@pytest.fixture(scope="module", params=MIXER_FIRST)
def trained(request, data_dir, tmp_path_factory):
    """(recipe, folder) of four steps on the digits, with noise."""
    config = shallow(request.param)
    config.total_steps, config.optim.warmup_steps = 4, 1
    config.model.stochastic_depth = 0.2
    config.checkpoint.every_steps = config.evals.test.every_steps = 2
    config.log_every_steps = 1
    folder = str(tmp_path_factory.mktemp(request.param) / "run")
    train.train(config, folder, data_dir=data_dir)
    return config, folder


def variables_of(source):
    return dict(leaves(pretrained.read(source, dtype=None).variables))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_a_run_is_evaluated_as_in_training(trained, data_dir):
    _, folder = trained
    scores = evaluate.evaluate(folder, data_dir=data_dir)["test"]
    recorded = [r for r in metrics.read(folder) if "test/top1" in r][-1]
    assert recorded["step"] == 4
    for metric in ("top1", "top5", "loss", "count"):
        assert scores[metric] == pytest.approx(recorded[f"test/{metric}"], rel=1e-5)


# Those that others are variants of; all have been seen to, see below.
LEARNERS = ("mixer", "resmlp", "gmlp", "kan_mixer", "s2mlp", "smlpnet", *PYRAMIDS)


@pytest.mark.slow
@pytest.mark.parametrize("word", LEARNERS)
def test_its_recipe_reads_digits(word, data_dir, tmp_path):
    """Three times as many as by chance, in a tenth of its steps."""
    config = digits(word)
    config.epochs = 6.0
    train.train(config, str(tmp_path), data_dir=data_dir)
    assert told(tmp_path)[-1]["test/top1"] >= 0.3


@pytest.mark.parametrize("word", WORDS)
def test_every_recipe_was_seen_to_read_95_percent_of_the_digits(word):
    results = json.loads((ROOT / "docs/benchmarks/family.json").read_text())
    assert results["digits"][word]["top1"] >= 0.95


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(
    trained, data_dir, tmp_path, monkeypatch
):
    config, folder = trained
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        assert int(train.train(config, str(tmp_path), data_dir=data_dir).step) == 2
    train.train(config, str(tmp_path), data_dir=data_dir)
    assert_same(variables_of(tmp_path), variables_of(folder))


def test_it_predicts_the_same_from_a_file_in_every_form(trained, tmp_path, root):
    _, folder = trained
    expected = variables_of(folder)
    fields = pretrained.read(folder).model
    for name in ("w.npz", "w.safetensors", "run"):
        source = tmp_path / name
        convert.convert(folder, source)
        assert_same(variables_of(source), expected)
        if name != "w.npz":  # the authors' files hold arrays alone
            assert pretrained.read(source).model == fields
    photos = [root / "docs" / "digits"]
    one, other = (
        list(predict.predict(x, photos, preprocess="timm")) for x in (folder, source)
    )
    assert len(one) > 1
    for a, b in zip(one, other, strict=True):
        assert a.classes == b.classes
        np.testing.assert_array_equal(a.features, b.features)


def test_fine_tuning_begins_where_a_run_ended(trained, data_dir, tmp_path):
    config, folder = trained
    config = config.copy_and_resolve_references()
    config.init_from = folder
    config.optim.learning_rate = config.optim.end_learning_rate = 0.0
    train.train(config, str(tmp_path), data_dir=data_dir)
    begun, ended = (pretrained.read(x, dtype=None).params for x in (tmp_path, folder))
    assert_same(dict(leaves(begun)), dict(leaves(ended)))


def test_an_export_computes_the_model(trained, tmp_path):
    config, folder = trained
    photos = jax.random.uniform(jax.random.key(1), (3, *config.model.image_size, 3))
    weights = pretrained.read(folder)
    export.export_stablehlo(weights, tmp_path / "m.stablehlo", gradients=False)
    program = jax.export.deserialize((tmp_path / "m.stablehlo").read_bytes())
    logits, _ = pretrained.create_model(weights).apply(weights.variables, photos)
    found = program.call(photos)["logits"]
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
