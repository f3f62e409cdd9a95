"""From a quantized torch model to the ONNX graphs that targets run: trace, spell, verify, check."""

from clusterq_deploy.export.half import to_half
from clusterq_deploy.export.integers import SiteComparison, compare_integers, require_same_integers
from clusterq_deploy.export.rules import RULES, Break, check_tensorrt, read_graph, require_tensorrt
from clusterq_deploy.export.spell import Spelling, spell
from clusterq_deploy.export.trace import annotate, export_graph
from clusterq_deploy.export.verify import Verification, verify

__all__ = [
    "RULES",
    "Break",
    "SiteComparison",
    "Spelling",
    "Verification",
    "annotate",
    "check_tensorrt",
    "compare_integers",
    "export_graph",
    "read_graph",
    "require_same_integers",
    "require_tensorrt",
    "spell",
    "to_half",
    "verify",
]
