"""Tests here import `random_parts` from their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
