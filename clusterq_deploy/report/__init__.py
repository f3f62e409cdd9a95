"""The report of a run: the Markdown and the HTML that people read."""

from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.results.report import Report, read_report

__all__ = ["Report", "read_report", "to_html", "to_markdown"]
