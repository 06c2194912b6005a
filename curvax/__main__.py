"""`python -m curvax` is `curvax`."""

import sys

from curvax.cli import main

sys.exit(main())
