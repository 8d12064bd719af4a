"""What the tests of parity share with the benchmarks: the import of packages that require torchvision."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import peer_packages

peer_packages.hide_operators()
