"""``python -m torchreg`` is the command ``torchreg``."""

import sys

from torchreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
