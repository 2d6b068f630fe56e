"""Models of the authors' own code, or of timm, each timed as timm_peer.py times timm's.

A request prepares a side with two more entries: `size`, a key of `PEERS`, and `code`,
the folder of a clone of the authors' repository, which is only run. Needs PyTorch and
timm, and torchvision for CycleMLP, whose layers are its deformable convolutions.
"""

import importlib
import sys
from typing import Any, NamedTuple

import timm_peer


class Peer(NamedTuple):
    """The same model elsewhere.

    Attributes:
      repository: the authors', as GitHub calls it; "": timm.
      module: where what makes it is.
      name: what makes it.
      fields: its arguments that make it ours, without stochastic depth.
    """

    repository: str
    module: str
    name: str
    fields: dict[str, Any]


_SPACH = ("microsoft/SPACH", "models.registry")
_TIMM = ("", "timm.models.mlp_mixer")
# Of each family the smallest size of the papers that has one.
PEERS = {
    "mixer_s32": Peer(*_TIMM, "mixer_s32_224", {}),
    "resmlp_12": Peer(*_TIMM, "resmlp_12_224", {}),
    "gmlp_ti16": Peer(*_TIMM, "gmlp_ti16_224", {}),
    "smlpnet_t": Peer(*_SPACH, "smlpnet_tiny", {}),
    "spach_xxs_mlp": Peer(*_SPACH, "spach_xxs_patch16_224_mlp", {}),
    "spach_xxs_conv": Peer(*_SPACH, "spach_xxs_patch16_224_conv", {}),
    "spach_xxs_attn": Peer(*_SPACH, "spach_xxs_patch16_224_attn", {}),
    "cyclemlp_b1": Peer("ShoufaChen/CycleMLP", "cycle_mlp", "CycleMLP_B1", {}),
    "hiremlp_tiny": Peer(
        "ggjy/Hire-Wave-MLP.pytorch", "mlp_based.hire_mlp", "hire_mlp_tiny", {}
    ),
    "msmlp_t": Peer(
        "JegZheng/MS-MLP",
        "models.ms_mlp",
        "MS_MLP",
        {
            "depths": [3, 3, 9, 3],
            "mix_size": [
                [1, 1, 3, 5, 7],
                [1, 3, 3, 5, 7],
                [1, 5, 5, 5, 7],
                [1, 7, 7, 7, 7],
            ],
            "drop_path_rate": 0.0,
        },
    ),
    "convmlp_s": Peer("SHI-Labs/Convolutional-MLPs", "src.convmlp", "convmlp_s", {}),
    "spach_ms_xxs_mlp": Peer(*_SPACH, "spach_ms_xxs_patch4_224_mlp", {}),
    "spach_ms_xxs_conv": Peer(*_SPACH, "spach_ms_xxs_patch4_224_conv", {}),
    "spach_ms_xxs_attn": Peer(*_SPACH, "spach_ms_xxs_patch4_224_attn", {}),
}


class Authors(timm_peer.Timm):
    """The sides that are prepared, by label, of one clone."""

    def net_of(self, side: dict[str, Any]) -> Any:
        """Returns the module of a side, without stochastic depth."""
        import timm.layers

        peer = PEERS[side["size"]]
        # Last, for a clone may hold a timm of its own.
        sys.path.append(side["code"])
        # A module of an older timm, which authors' code imports.
        sys.modules["timm.models.layers.helpers"] = timm.layers.helpers
        net = getattr(importlib.import_module(peer.module), peer.name)(**peer.fields)
        for module in net.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        return net


if __name__ == "__main__":
    timm_peer.main(Authors())
