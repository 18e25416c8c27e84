# SPDX-License-Identifier: Apache-2.0
"""What a model knows: how it is asked, what it answers, how likely an answer is, and the category that follows."""
