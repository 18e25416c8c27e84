# SPDX-License-Identifier: Apache-2.0
"""The paper that both trainers implement, in the form in which TRL's trainers name theirs in the model card."""

import textwrap


PAPER = {
    "title": "Why Fine-Tuning Encourages Hallucinations and How to Fix It",
    "id": "2604.15574",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{kaplan2026why,
            title        = {{Why Fine-Tuning Encourages Hallucinations and How to Fix It}},
            author       = {Kaplan and Gekhman and Zhu and Rozner and Reif and Swayamdipta and Hoiem and Schwartz},
            year         = 2026,
            eprint       = {arXiv:2604.15574},
        }"""),
}
