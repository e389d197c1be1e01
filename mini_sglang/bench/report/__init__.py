"""``mini-sglang bench report``: the JSON of benchmarks as one HTML page and PNG files.

``reading`` checks a file, ``prepare`` makes a ``content.Report`` of it, ``page`` writes the HTML, and
``drawing`` with ``bars`` and ``lines`` draws its charts: matplotlib is imported there alone, in functions.
"""
