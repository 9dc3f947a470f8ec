"""Tiny offline models of every family, masked dense oracles and the conformance suite for mmkv adapters."""

__version__ = "0.1.0"
