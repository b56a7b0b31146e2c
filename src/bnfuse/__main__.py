"""``python -m bnfuse`` is the command ``bnfuse``."""

import sys

from bnfuse.tools.cli import main

sys.exit(main())
