"""The stages, strung together over one run directory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from clusterq_deploy import stages
from clusterq_deploy.export.integers import SiteComparison
from clusterq_deploy.quantize import BitWidths
from clusterq_deploy.results.report import Report
from clusterq_deploy.run.manifest import StageRecord
from clusterq_deploy.run.run import FP32, Run


@dataclass(frozen=True)
class Step:
    """A stage of a run: its name in the run directory, and the call that does it unless it is finished."""

    name: str
    do: Callable[[], StageRecord | None]


class Pipeline(Run):
    """A run, and the stages that fill its directory.

    Every stage is done at most once for the same inputs; a stage that needs another one's files asks for them.
    """

    def synthesize(self) -> StageRecord:
        """Make the calibration set."""
        return stages.make_images(self)

    def sensitivity(self, bits: BitWidths) -> StageRecord:
        """Measure what the quantization of each layer alone costs, on synthetic images."""
        return stages.measure_sensitivity(self, bits)

    def quantize(self, bits: BitWidths) -> StageRecord:
        """Make one variant: quantizers, scales, fine-tuning."""
        return stages.make_variant(self, bits)

    def export(self, variant: str) -> StageRecord:
        """Write a variant's graphs, each verified against torch first."""
        return stages.write_graphs(self, variant)

    def compare_graphs(self, variant: str, images: int) -> Iterator[tuple[str, float, list[SiteComparison]]]:
        """Hold a variant's graphs against torch on up to so many synthetic images; see `stages.compare_graphs`."""
        return stages.compare_graphs(self, variant, images)

    def build(self, variant: str) -> StageRecord | None:
        """Build a variant's TensorRT engine; None where that cannot be done."""
        return stages.build_engine(self, variant)

    def evaluate(self, variant: str) -> StageRecord:
        """Measure a variant's accuracy in torch and as each runtime executes its graphs."""
        return stages.measure_accuracy(self, variant)

    def features(self) -> StageRecord:
        """Lay the teacher's features of the synthetic images beside those of real ones; the report alone reads it."""
        return stages.measure_features(self)

    def benchmark(self) -> StageRecord:
        """Time FP32 and every exported variant in turn, each as its target executes it."""
        return stages.measure_latency(self)

    def report(self) -> Report:
        """Write report.json, report.md and report.html from what the stages measured."""
        return stages.write_report(self)

    def steps(self) -> list[Step]:
        """Every stage of the run but the report, in order."""
        bits, variants = self.config.bits, [FP32, *self.config.bits]
        return [
            # first, so that a model that cannot be exported is found before the work
            Step(f"export/{FP32}", partial(self.export, FP32)),
            Step("synthesize", self.synthesize),
            *(Step(f"quantize/{own}", partial(self.quantize, own)) for own in self.config.widths),
            *(Step(f"export/{own}", partial(self.export, own)) for own in bits),
            *(Step(f"build/{own}", partial(self.build, own)) for own in variants),
            *(Step(f"evaluate/{own}", partial(self.evaluate, own)) for own in variants),
            Step("features", self.features),
            Step("benchmark", self.benchmark),
        ]

    def run(self) -> Report:
        """Every stage in order."""
        self.begin()
        for step in self.steps():
            step.do()
        report = self.report()
        self.directory.forget()
        return report
