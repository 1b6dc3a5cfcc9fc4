"""The benchmarks are commands, run from their own folder: their modules import each other by bare names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
