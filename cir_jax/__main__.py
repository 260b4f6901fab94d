"""`python -m cir_jax` lists the commands."""

from cir_jax.commands import COMMANDS

if __name__ == "__main__":
    print("Two-stage image retrieval in JAX. Commands (each answers --help):\n")
    for name, what in COMMANDS.items():
        print(f"  python -m cir_jax.{name:<8} {what}")
