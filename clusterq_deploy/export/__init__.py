"""From a quantized torch model to the ONNX graphs that targets run: trace, spell, verify."""

from clusterq_deploy.export.spell import Spelling, spell
from clusterq_deploy.export.trace import annotate, export_graph
from clusterq_deploy.export.verify import Verification, verify

__all__ = ["Spelling", "Verification", "annotate", "export_graph", "spell", "verify"]
