"""The GPU benchmark: ``benchmarks/gpu.sh``."""
