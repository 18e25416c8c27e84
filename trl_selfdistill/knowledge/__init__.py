# SPDX-License-Identifier: Apache-2.0
"""What a model knows: SLiCK categories, training data chosen by them, and accuracy while it trains."""
