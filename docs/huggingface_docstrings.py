# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's docstrings in the form that the site's generator (griffe) reads, which is Google's."""

import re

import griffe


GROUP_OF_PARAMETERS = re.compile(r"^ *(> .*\n|# docstyle-ignore)\n", re.MULTILINE)
PARAMETER = re.compile(r"^( +\w+) \((.+?)(, \*optional\*.*)?\):", re.MULTILINE)
RETURNED_OR_RAISED = re.compile(r"^( +)(\[?`.+?`\]?):", re.MULTILINE)
NAME = re.compile(r"\[`~?([\w.]+)`\]")
LINK = r'<autoref optional identifier="trl_selfdistill.\1"><code>\1</code></autoref>'


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstring of each object. Defaults are left to the signature."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = GROUP_OF_PARAMETERS.sub("", obj.docstring.value)
            text = PARAMETER.sub(lambda found: f"{found[1]} ({self._plain(found[2])}):", text)
            text = RETURNED_OR_RAISED.sub(lambda found: f"{found[1]}{self._plain(found[2])}:", text)
            obj.docstring.value = NAME.sub(LINK, text)

    @staticmethod
    def _plain(types: str) -> str:
        return re.sub(r"\[`~?|`\]?|(?<= )\[|~", "", types)
