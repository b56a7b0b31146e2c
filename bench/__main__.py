"""``python -m bench``: see :mod:`bench.command`, a module of its own so that other processes can import it."""

import sys

from bench.command import main

sys.exit(main())
