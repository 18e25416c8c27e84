# SPDX-License-Identifier: Apache-2.0
"""The stages from facts to checkpoints and report, each done once."""
