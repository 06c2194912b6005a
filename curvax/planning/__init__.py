"""Memory and cost of a training step on other machines, from the compiled program."""
