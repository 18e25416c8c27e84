# SPDX-License-Identifier: Apache-2.0
"""`python -m trl_selfdistill` is `trl-selfdistill`."""

from .cli import main


if __name__ == "__main__":
    raise SystemExit(main())
