# SPDX-License-Identifier: Apache-2.0
"""Tables of facts, read from files, made from GeoNames, or invented."""
