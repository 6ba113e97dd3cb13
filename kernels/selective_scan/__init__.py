"""S6, the selective scan of Mamba-1: one direction, both directions, and one step for decoding."""

from mambaverse.kernels.selective_scan.bidirectional import bidirectional_selective_scan
from mambaverse.kernels.selective_scan.scan import selective_scan
from mambaverse.kernels.selective_scan.update import selective_scan_update

__all__ = ["bidirectional_selective_scan", "selective_scan", "selective_scan_update"]
