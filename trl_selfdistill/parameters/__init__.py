# SPDX-License-Identifier: Apache-2.0
"""The parameters of a causal language model: their groups, freezing them, proof that they did not move."""
