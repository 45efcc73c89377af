"""``python -m timbre_server`` is ``timbre``."""

from __future__ import annotations

import sys

from timbre_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
