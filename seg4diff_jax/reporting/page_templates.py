"""Opens the templates of pages. A page needs no file beside it: style sheet, plots and pictures are in it."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from seg4diff_jax.reporting.colors import PAGE_COLORS


def page_environment(folder: str) -> Environment:
    """Returns the environment of the templates in a folder of the package, with the pages' style sheet and colours.

    A template includes `page.css`, and has `page_colors`.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("seg4diff_jax", each) for each in (folder, "reporting/templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["page_colors"] = PAGE_COLORS
    return environment
