# SPDX-License-Identifier: Apache-2.0
"""Which answers are right, wrong, or none, and how sure a rate of them is. No models, no torch."""
