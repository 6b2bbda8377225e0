"""``python -m gpt2fast``."""

import sys

from gpt2fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
