"""`python -m curvax` is `curvax`."""

import sys

from curvax.cli.main import main

sys.exit(main())
