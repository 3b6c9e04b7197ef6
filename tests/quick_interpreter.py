"""Triton's interpreter in half the time: the language is made its own once a launch.

To interpret a function, Triton 3.7.1 looks through all of ``triton.language`` for what it has to
replace, and does so again at every call of a function that a kernel calls, where all is replaced
already. That took half of the time of the small kernels that are interpreted here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton import language
from triton.runtime import interpreter


def look_once(patch_language: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what calls ``patch_language`` unless all that a function would see is replaced."""

    def patch(function: Any) -> Any:
        # What is replaced is no builtin of the language any more.
        for value in function.__globals__.values():
            is_language = value is language or value is language.core
            if is_language and language.core.is_builtin(value.load):
                return patch_language(function)
        return SimpleNamespace(restore=lambda: None)

    return patch


if hasattr(interpreter, "_patch_lang"):  # a Triton without it is as slow as it is
    interpreter._patch_lang = look_once(interpreter._patch_lang)
