"""python -m posttrain. Next: cli.py."""

import sys

from posttrain.cli import main

sys.exit(main())
