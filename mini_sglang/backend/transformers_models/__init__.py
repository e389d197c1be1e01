"""Causal LMs outside the native families, through transformers' own modelling code.

transformers is an extra, imported inside the functions that need it.
"""
