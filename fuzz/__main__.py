"""``python -m fuzz``: see :mod:`fuzz.command`, a module of its own so that other processes can import it."""

import sys

from fuzz.command import main

sys.exit(main())
