"""Pages from the templates of this package."""

from __future__ import annotations

from typing import Any


def render(name: str, values: dict[str, Any]) -> str:
    """Renders a template; text is escaped, and a missing value is an error.

    Args:
        name: File name in ``reporting/templates``.
        values: Values that the template uses.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topkd.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(values)
