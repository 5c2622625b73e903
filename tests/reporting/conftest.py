"""Tests here share a helper module; under pytest's importlib mode a test folder is not on the path by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
