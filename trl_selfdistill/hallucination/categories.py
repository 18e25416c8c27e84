# SPDX-License-Identifier: Apache-2.0
"""The names of SLiCK's categories (arXiv 2405.05904). [`~trl_selfdistill.slick.slick.annotate_facts`] assigns them."""

from enum import StrEnum


class SlickCategory(StrEnum):
    """How well a model knows a fact. "Known" means the first three."""

    HIGHLY_KNOWN = "HighlyKnown"
    MAYBE_KNOWN = "MaybeKnown"
    WEAKLY_KNOWN = "WeaklyKnown"
    UNKNOWN = "Unknown"
