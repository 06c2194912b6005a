"""What goes on inside a network at a point: active units, norms of activations, attention."""
