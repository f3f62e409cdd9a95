"""The report of a run, in Markdown and HTML."""

from clusterq_deploy.report.documents import to_html, to_markdown
from clusterq_deploy.results.report import Report, read_report

__all__ = ["Report", "read_report", "to_html", "to_markdown"]
