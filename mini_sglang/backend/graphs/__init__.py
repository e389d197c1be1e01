"""Steps recorded once as CUDA graphs and replayed: what ``kernels/program.py`` is to a CPU."""
