"""The surroundings of a run: its folder, processes, signals and logs."""
