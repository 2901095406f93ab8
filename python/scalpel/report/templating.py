"""The templates and the style that all pages share."""

import jinja2

from .card import number

__all__ = ["environment_and_style"]


def environment_and_style() -> tuple[jinja2.Environment, str]:
    """The environment of the templates, in which an undefined name is an error, and the text of style.css."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scalpel.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    loader = environment.loader
    assert loader is not None
    return environment, loader.get_source(environment, "style.css")[0]
