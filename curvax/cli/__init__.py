"""The command line of curvax: `main` reads it, and each command has a module of its own."""
