# SPDX-License-Identifier: Apache-2.0
"""The studies beside the library: facts, training mixes, experiments. The library imports none of it."""
