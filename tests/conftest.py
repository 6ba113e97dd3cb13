"""What all tests share: one thread for each of several workers."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, and by the processes that tests start. The workers fill the cores already; the tests
    # of what several threads compute ask for them by torch.set_num_threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
