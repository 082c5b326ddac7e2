"""Tests at real sizes; without a GPU there is nothing to collect. `python -m pytest tests/gpu` on a GPU machine."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
