# SPDX-License-Identifier: Apache-2.0
"""Why fine-tuning makes a model forget: three hypotheses as experiments."""
