"""Workers of pytest-xdist share the host's cores: the reference's threads in each would wait for each other."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
