"""MLP-Mixer (Tolstikhin et al., arXiv 2105.01601) and its relatives in JAX/Flax.

`import mlp_mixer` loads nothing heavy; import what you need:
`from mlp_mixer import models`.
"""

__version__ = "0.1.0"
