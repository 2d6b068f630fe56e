"""Data on the host: sources, image operations, batches; numpy only, never jax."""
