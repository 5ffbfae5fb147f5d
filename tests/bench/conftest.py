"""Makes `bench` importable however pytest is started: it is not installed with the package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
