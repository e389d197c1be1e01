#!/bin/sh
# The GPU benchmark; installs nothing. See docs/gpu.md.
#
#   benchmarks/gpu.sh [--json FILE] [--minutes 9] [--only PART,PART] [--set NAME=VALUE]...
#   benchmarks/gpu.sh --device cpu --tiny      # a rehearsal, without a GPU
#
# PYTHON says which interpreter has torch; by default python3.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 2
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
