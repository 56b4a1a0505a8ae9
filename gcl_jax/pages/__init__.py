"""HTML pages that need nothing but themselves: the report, and answers of a search."""

from gcl_jax.pages.page import check_page, render, write_page
from gcl_jax.pages.report import report_page
from gcl_jax.pages.results import Result, read_results

__all__ = [
  "Result",
  "check_page",
  "read_results",
  "render",
  "report_page",
  "write_page",
]
