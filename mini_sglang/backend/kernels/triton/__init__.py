"""Triton kernels for CUDA; under ``TRITON_INTERPRET=1`` they run on a CPU, slowly, for tests.

``attention_kernels`` and ``elementwise_kernels`` import triton, which reads ``TRITON_INTERPRET`` while it
decorates: they are imported inside functions alone.
"""
