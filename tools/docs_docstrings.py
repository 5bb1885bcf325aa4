"""Docstrings as mkdocstrings wants them: :class:`X` a link, Example: doctests. See mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites every docstring; a name that the site does not have, such as torch's, is left as code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for everything that griffe finds."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("Example:\n", "Examples:\n")
            obj.docstring.value = _ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', text)
