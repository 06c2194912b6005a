"""What a training step needs on machines that are not at hand, read from the compiled program."""
