# SPDX-License-Identifier: Apache-2.0
"""Model and dataset cards, and what goes to the Hub."""
