# SPDX-License-Identifier: Apache-2.0
"""Facts from rows, checked as those of a file."""

from trl_selfdistill.studies.facts.table import checked_table


def facts_from_rows(rows):
    return checked_table(((f"facts, row {number}", row) for number, row in enumerate(rows, start=1)), "facts")
