"""Load held and faults survived: each row starts real servers over tiny random models."""
