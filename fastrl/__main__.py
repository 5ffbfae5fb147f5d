"""`python -m fastrl`: the command line, as torchrun starts it."""

import sys

from fastrl.cli import main

sys.exit(main())
