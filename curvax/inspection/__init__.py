"""The geometry of the losses of trained runs: numbers, figures, and a page that compares them."""
