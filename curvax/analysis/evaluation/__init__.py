"""How a measure is evaluated: compiled once, on a batch or over a whole data set."""
