# SPDX-License-Identifier: Apache-2.0
"""Work that the processes of a distributed launch share, with the result of one process."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


Item = TypeVar("Item")
Result = TypeVar("Result")


def share_of_process(items: Sequence[Item]) -> list[Item]:
    """What this process has to do of `items`: every n-th of n processes, so that a slow stretch is shared too."""
    state = PartialState()
    return list(items[state.process_index :: state.num_processes])


def map_in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """
    `[function(item) for item in items]`, each process doing its share. A collective: call it on every process.

    Args:
        function (`Callable`):
            Called once an item, on one of the processes. It must not be a collective itself: the shares may differ in
            length.
        items (`Sequence`):
            The same on every process.

    Returns:
        `list`: All results in the order of the items, on every process. They are pickled on the way.

    Raises:
        Exception: What `function` raised, on the process where it did.
        RuntimeError: On the others, naming that process, instead of waiting for it for ever.
    """
    state = PartialState()
    results, error = [], None
    try:
        results = [function(item) for item in share_of_process(items)]
    except Exception as raised:  # raised below, once the others know
        error = raised
    shares = gather_object([(results, repr(error) if error is not None else None)])
    if error is not None:
        raise error
    for index, (_, failure) in enumerate(shares):
        if failure is not None:
            raise RuntimeError(f"Process {index} of {state.num_processes} failed: {failure}")
    merged: list = [None] * len(items)
    for index, (share, _) in enumerate(shares):
        merged[index :: state.num_processes] = share
    return merged


def on_main_process(function: Callable[[], Result]) -> Result:
    """
    What `function` returns on the main process, on every process. A collective.

    Raises:
        Exception: What `function` raised, on every process.
    """
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as raised:
            outcome[1] = raised
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
