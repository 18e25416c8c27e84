# SPDX-License-Identifier: Apache-2.0
"""What a model answers to questions, and how likely an answer is."""
