"""``python -m robot_forgetting.cli``."""

import sys

from robot_forgetting.cli import main

sys.exit(main())
