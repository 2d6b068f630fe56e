"""Records authors_CASE.safetensors and authors_CASE.npz from authors' code; README.md.

A small model of the authors' own classes with random parameters, all of them, images,
and its logits, computed in float64. The first argument is the folder of a clone of
their repository, which is only run; the second the case, a key of `CASES`:

    python tests/golden/record_authors.py build/SPACH spach_mlp

The images are what the model itself takes: whoever normalises is before it. The npz
file holds our model's name and those of its fields that no shape tells, as JSON, and
the command.

Of a model with BatchNorm the running statistics are random too, and the npz file also
holds what three steps of training make of it: plain SGD on these images and `labels`,
at the learning rate `rate`, with the mean cross-entropy. `after/NAME` are the running
statistics then, and `logits_after` the logits in evaluation.
"""

import ast
import functools
import importlib
import json
import pathlib
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).parent
CLASSES = 5
NUM_STEPS = 3


def spach(mixing):
    """A single-stage SPACH; it wants a square grid, so the patch is not square."""
    return importlib.import_module("models.spach").Spach(
        num_classes=CLASSES,
        img_size=(16, 32),
        patch_size=(4, 8),
        hidden_dim=24,
        num_heads=3,
        net_arch=[(mixing, 2)],
    )


def paramixer(block, mlp, times=1):
    """A ParaMixer, or one of its relatives; each block is applied so many times."""
    mixers, layers = map(importlib.import_module, ("models.mixers", "models.layers"))
    return mixers.MlpMixer(
        num_classes=CLASSES,
        img_size=(12, 32),
        patch_size=(4, 8),
        embed_dim=16,
        num_blocks=2,
        block_layer=getattr(layers, block),
        mlp_layer=getattr(layers, mlp),
        n_iter=times,
    )


def ninformer():
    """A NiNformer. Its classifier stands in a script that would train at import."""
    import torch

    module = importlib.import_module("ninformer")
    path = pathlib.Path(str(module.__file__)).with_name("train.py")
    script = ast.parse(path.read_text())
    wanted = ("check_sizes", "NiNformerImageClassification")
    script.body = [x for x in script.body if getattr(x, "name", "") in wanted]
    names: dict[str, Any] = {"nn": torch.nn, "NiNformer": module.NiNformer}
    exec(compile(script, path, "exec"), names)
    return names["NiNformerImageClassification"](
        image_size=16,
        patch_size=4,
        num_classes=CLASSES,
        d_model=16,
        d_ffn=24,
        seq_len=12,
        num_layers=2,
    )


def kan_mixer():
    """Cheon's KAN-Mixer: it counts 4 x 4 patches, and takes 2 x 8 as well."""
    return importlib.import_module("kan_mixer.kan_mixer").KAN_Mixer(
        n_layers=2,
        n_channel=8,
        n_hidden=10,
        n_output=CLASSES,
        image_size=8,
        patch_size=2,
        n_image_channel=3,
    )


def resmlp():
    """A ResMLP of the authors, whose names are not timm's."""
    return importlib.import_module("resmlp_models").resmlp_models(
        num_classes=CLASSES,
        img_size=(12, 32),
        patch_size=(4, 8),
        embed_dim=16,
        depth=2,
    )


def smlpnet():
    """A sMLPNet; it wants a square image."""
    return importlib.import_module("models.smlp").sMLPNet(
        dim=6, alpha=2, num_classes=CLASSES, image_size=64, depths=[1, 2, 1, 1]
    )


def cyclemlp():
    """A CycleMLP, some of whose layers are deformable convolutions of torchvision."""
    return importlib.import_module("cycle_mlp").CycleNet(
        layers=[1, 2, 1, 1],
        embed_dims=[8, 12, 16, 20],
        mlp_ratios=[4, 2, 3, 2],
        transitions=[True] * 4,
        num_classes=CLASSES,
    )


def hiremlp():
    """A Hire-MLP of all regions and steps; its image is not square."""
    return importlib.import_module("mlp_based.hire_mlp").HireMLPNet(
        layers=[2, 2, 3, 2],
        num_classes=CLASSES,
        embed_dims=[8, 8, 12, 16],
        mlp_ratios=[4, 4, 4, 4],
        pixel=[4, 3, 3, 2],
        step_stride=[2, 2, 3, 2],
        step_dilation=[2, 2, 1, 1],
    )


def msmlp():
    """An MS-MLP with the chunks and the filters of all published ones."""
    return importlib.import_module("models.ms_mlp").MS_MLP(
        num_classes=CLASSES,
        img_size=(32, 64),
        embed_dim=9,
        depths=[2, 1, 1, 1],
        mix_size=[[1, 1, 3, 5, 7], [1, 3, 3, 5, 7], [1, 5, 5, 5, 7], [1, 7, 7, 7, 7]],
        mlp_ratio=1,
    )


def convmlp():
    """A ConvMLP, without the drop-path that it always has."""
    model = importlib.import_module("src.convmlp").ConvMLP(
        blocks=[1, 2, 1],
        dims=[10, 12, 14],
        mlp_ratios=[3, 3, 3],
        channels=8,
        n_conv_blocks=2,
        num_classes=CLASSES,
    )
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def spach_ms(stem, patch_size, *stages):
    """A SPACH of four stages, of 8 x 8 tokens and fewer."""
    stems = importlib.import_module("models.spach.layers.stem")
    stems.STEM_LAYER["conv4"] = functools.partial(stems.Conv4PatchEmbed, hidden_chans=6)
    return importlib.import_module("models.spach").SpachMS(
        num_classes=CLASSES,
        img_size=tuple(8 * side for side in patch_size),
        patch_size=patch_size,
        hidden_dim=4,
        num_heads=2,
        net_arch=[[("pass", 1)], *stages],
        stem_type=stem,
    )


class Case(NamedTuple):
    """What is recorded of one model.

    Attributes:
      make: makes it.
      arguments: arguments of `make`.
      image_size: (height, width) in pixels.
      model: our model's name, and its fields that no shape tells.
      images: number of images.
      rate: learning rate of the steps of training.
    """

    make: Any
    arguments: tuple[Any, ...]
    image_size: tuple[int, int]
    model: dict[str, Any]
    images: int = 2
    rate: float = 0.05


CASES = {
    "resmlp": Case(resmlp, (), (12, 32), {"name": "resmlp"}),
    "paramixer_vanilla": Case(
        paramixer, ("vMixerBlock", "vMlp"), (12, 32), {"name": "paramixer"}
    ),
    "paramixer_para": Case(
        paramixer, ("pMixerBlock", "vMlp"), (12, 32), {"name": "paramixer"}
    ),
    "paramixer_sym": Case(
        paramixer, ("pMixerBlock", "sMlp"), (12, 32), {"name": "paramixer"}
    ),
    "paramixer_asym": Case(
        paramixer,
        ("pMixerBlock", "aMlp"),
        (12, 32),
        {"name": "paramixer", "mlp": "asym"},
    ),
    "paramixer_repeated": Case(
        paramixer,
        ("pMixerBlock", "sMlp", 2),
        (12, 32),
        {"name": "paramixer", "n_iter": 2},
    ),
    "ninformer": Case(ninformer, (), (8, 24), {"name": "ninformer"}),
    "kan_mixer": Case(kan_mixer, (), (4, 16), {"name": "kan_mixer"}),
    "spach_mlp": Case(spach, ("mlp",), (16, 32), {"name": "spach"}),
    "spach_conv": Case(spach, ("pass",), (16, 32), {"name": "spach"}),
    "spach_attn": Case(spach, ("attn",), (16, 32), {"name": "spach", "num_heads": 3}),
    **{
        f"spach_ms_{mixing}": Case(
            spach_ms,
            ("conv1", (4, 8), [(word, 1)], [(word, 2)], [(word, 1)]),
            (32, 64),
            {"name": "spach_ms", **heads},
        )
        for mixing, word, heads in (
            ("mlp", "mlp", {}),
            ("conv", "pass", {}),
            ("attn", "attn", {"num_heads": 2}),
        )
    },
    # With as many layers before attention as in the published models.
    "spach_ms_hybrid": Case(
        spach_ms,
        (
            *("conv4", (4, 4)),  # the patch is as published: no shape tells it
            *[[("pass", 2), ("attn", i)] for i in (1, 2)],
            [("pass", 1), ("attn", 1)],
        ),
        (32, 32),
        {"name": "spach_ms", "num_heads": 2},
        images=4,
    ),
    "smlpnet": Case(smlpnet, (), (64, 64), {"name": "smlpnet"}, images=4),
    "cyclemlp": Case(cyclemlp, (), (32, 64), {"name": "cyclemlp"}),
    "hiremlp": Case(hiremlp, (), (64, 96), {"name": "hiremlp"}, images=4),
    "msmlp": Case(msmlp, (), (32, 64), {"name": "msmlp"}),
    "convmlp": Case(convmlp, (), (32, 64), {"name": "convmlp"}, images=4),
}


def three_steps(model, image, rate):
    """Trains a model, and returns what the npz file holds of that."""
    import torch

    labels = torch.arange(len(image)) % CLASSES
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    for _ in range(NUM_STEPS):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(image), labels).backward()
        optimiser.step()
    running = {k: x for k, x in model.named_buffers() if "running_" in k}
    with torch.no_grad():
        logits = model.eval()(image)
    return {
        "labels": labels.numpy(),
        "rate": np.array(rate),
        "logits_after": logits.float().numpy(),
        **{f"after/{name}": x.float().numpy() for name, x in running.items()},
    }


def main():
    """Records what the command line says."""
    import safetensors.torch
    import timm.layers
    import torch

    code, name = sys.argv[1:]
    case = CASES[name]
    # Last, for a clone may hold a timm of its own.
    sys.path.append(str(pathlib.Path(code).absolute()))
    # A module of an older timm, which the authors' code imports.
    sys.modules["timm.models.layers.helpers"] = timm.layers.helpers
    warnings.simplefilter("ignore")  # of an older timm's names
    torch.manual_seed(0)
    model = case.make(*case.arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        running = {k: x for k, x in model.named_buffers() if "running_" in k}
        for key, buffer in running.items():
            drawn = 0.2 * torch.randn_like(buffer)
            buffer.copy_(drawn.exp() if key.endswith("running_var") else drawn)
        image = torch.randint(-64, 65, (case.images, 3, *case.image_size)) / 64
        state = {k: x.contiguous() for k, x in model.state_dict().items()}
        safetensors.torch.save_file(state, HERE / f"authors_{name}.safetensors")
        logits = model.double()(image.double()).float()
    folder = pathlib.Path(code).name
    np.savez_compressed(
        HERE / f"authors_{name}.npz",
        image=image.permute(0, 2, 3, 1).numpy(),
        logits=logits.numpy(),
        model=np.array(json.dumps(case.model)),
        command=np.array(f"record_authors.py {folder} {name}"),
        **three_steps(model, image.double(), case.rate) if running else {},
    )


if __name__ == "__main__":
    main()
