"""A page as one HTML file: style and figures inside, no script, nothing fetched. No torch.

The template escapes whatever it is given; figures alone are taken as they are. A content-security policy in the page forbids scripts and
requests, should anything slip through.
"""

from __future__ import annotations

from importlib.resources import files

from dsfreeze.report.sections import Page, is_numeric, shown

TEMPLATE = "page.html.jinja"


def to_html(page: Page) -> str:
    """The whole file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(page=page, shown=shown, is_numeric=is_numeric) + "\n"
