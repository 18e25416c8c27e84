# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of the package run and are right."""

import doctest
import importlib
import pkgutil

import pytest

import trl_selfdistill


class MarkdownDocTestParser(doctest.DocTestParser):
    """Docstrings fence their examples in Markdown; without this, doctest takes the closing fence for output."""

    def parse(self, string, name="<string>"):
        lines = ("" if line.strip() in ("```", "```python") else line for line in string.split("\n"))
        return super().parse("\n".join(lines), name)


MODULES = [module.name for module in pkgutil.walk_packages(trl_selfdistill.__path__, "trl_selfdistill.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=MarkdownDocTestParser(), exclude_empty=True).find(module):
        runner.run(test)
    assert runner.failures == 0


def test_the_parser_finds_examples_and_wrong_ones_fail():
    examples = MarkdownDocTestParser().get_doctest("```python\n>>> 1 + 1\n3\n```\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(examples, out=lambda text: None) == (1, 1)
