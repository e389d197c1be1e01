"""The real sglang's server, mini-sglang's and others' side by side over HTTP."""

import sys

from mini_sglang.bench.server_cli import main

if __name__ == "__main__":
    sys.exit(main())
