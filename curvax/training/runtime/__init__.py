"""What a run needs of its surroundings: config, folder, processes, signals, logs."""
