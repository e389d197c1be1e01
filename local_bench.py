"""The real sglang, mini-sglang and Hugging Face side by side, each in a process of its own."""

import sys

from mini_sglang.bench.local_cli import main

if __name__ == "__main__":
    sys.exit(main())
