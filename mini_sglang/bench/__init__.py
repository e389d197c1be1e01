"""Comparisons with other stacks, and load: ``mini-sglang bench``, ``local_bench.py``, ``server_bench.py``."""
