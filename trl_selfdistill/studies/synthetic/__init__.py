# SPDX-License-Identifier: Apache-2.0
"""Any number of facts that no model knows, with keys like real names or not."""
