"""Triton has wheels for Linux alone: elsewhere there is nothing to interpret."""

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
