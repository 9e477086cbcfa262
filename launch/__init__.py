"""The commands: each reads the command line, wires the parts of `monolith_jax` together, and runs them."""
