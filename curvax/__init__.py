"""curvax: curvature and sharpness as composable Optax stages."""
