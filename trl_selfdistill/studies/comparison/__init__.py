# SPDX-License-Identifier: Apache-2.0
"""Ways to train on new facts without losing old ones, side by side."""
