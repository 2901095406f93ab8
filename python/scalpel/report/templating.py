"""The templates and the style that all pages share."""

import jinja2

from .card import number

__all__ = ["environment_and_style", "text_of"]


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
    return environment, text_of(environment, "style.css")


def text_of(environment: jinja2.Environment, name: str) -> str:
    """The text of a file beside the templates, such as a style or a script."""
    loader = environment.loader
    assert loader is not None
    return loader.get_source(environment, name)[0]
