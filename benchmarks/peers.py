"""Peers that programs here time beside ours: transformers and mambapy, which need not be installed."""

from __future__ import annotations

from mambaverse.bench.peers import installed

REMEDY = "install them with `pip install '.[bench]'`"


def missing(*packages: str) -> str:
    """Return those of `packages` that are not installed, and how to install them; "" if all are there."""
    absent = [package for package in packages if not installed(package)]
    return f"not installed: {', '.join(absent)}; {REMEDY}" if absent else ""
