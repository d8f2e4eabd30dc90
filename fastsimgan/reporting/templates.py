"""Pages from template files: Jinja2, which torch needs too, with every value escaped where the page is HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def fill_in(template: Path, **values: Any) -> str:
    """The text of a template file with ``values`` in it.

    Args:
        template: a file of this package; in ``.html`` values are escaped, and ``tojson`` is safe within a script.
        values: all that the template names; one that is missing raises jinja2.UndefinedError.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html"], default=False),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keys in the order that they were given
    return environment.get_template(template.name).render(values)
