# SPDX-License-Identifier: Apache-2.0
"""`python -m trl_selfdistill` is `trl-selfdistill`."""

import sys

from .cli import main


sys.exit(main())
