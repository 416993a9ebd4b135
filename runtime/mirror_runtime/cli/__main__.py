"""`python -m mirror_runtime.cli`: the `mirror` command."""

import sys

from mirror_runtime.cli.entry import main

sys.exit(main())
