"""Optimisers for tests that need one, whichever it is."""

from mlp_mixer import optim, recipe


def create(**fields):
    """`optim.create` with the fields of `recipe.base()` but for these."""
    return optim.create(**dict(recipe.base().optim) | fields)
