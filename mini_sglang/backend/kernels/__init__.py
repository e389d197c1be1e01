"""Matrix products in C++, built at first use; ``KERNELS=reference`` runs everything on torch instead.

The plain-torch twins, with the same signatures, are in ``backend/weights.py`` and ``backend/quant.py``.
"""
