"""The whole product on one screen: the stages of a run, what goes into each, and what comes out."""

from collections.abc import Iterator

from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.lowering.integers import SiteComparison
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.results import stages as results
from clusterq_deploy.results.report import Report
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import AnyStage, Finished, Stage
from clusterq_deploy.runtimes.tensorrt import unavailable_reason
from clusterq_deploy.stages import (
    benchmark,
    build,
    evaluate,
    export,
    features,
    quantize,
    report,
    rtx,
    sensitivity,
    synthesize,
)


def stages(config: RunConfig) -> list[AnyStage]:
    """Return every stage of a run but the report, in order."""
    bits, variants = config.bits, [FP32, *config.bits]
    return [
        Stage(export, FP32),  # model -> fp32/model.onnx, model.fp16.onnx; first, because it may fail
        Stage(synthesize),  # model -> calibration/images.safetensors, preview.png
        *(Stage(quantize, width) for width in bits),  # model, images -> V/quantized.safetensors
        *(Stage(export, width) for width in bits),  # student -> V/model.ort.onnx, model.trt.onnx, model.int4.onnx
        *(Stage(build, variant) for variant in variants),  # graph for TensorRT -> V/model.engine
        # the same, and those of the float model -> V/model.rtx.engine, V/model.fp16.rtx.engine, if asked for
        *(Stage(rtx, variant) for variant in variants if config.build.rtx),
        *(Stage(evaluate, variant) for variant in variants),  # graphs, engines, evaluation images -> accuracy
        Stage(features),  # synthetic and real images -> their features, compared
        Stage(benchmark),  # graphs, engines -> latency
    ]


def unavailable(stage: AnyStage) -> str | None:
    """Return why a stage cannot be done here, or None."""
    return unavailable_reason() if stage.kind is build else None


class Pipeline(Run):
    """A run with its stages; each is done at most once for the same inputs."""

    def run(self) -> Report:
        """Do every stage in order, and write the report."""
        self.write_config()
        for stage in stages(self.config):
            if unavailable(stage) is None:
                self.do(stage)
        report = self.report()
        self.directory.remove_checkpoints()
        return report

    def synthesize(self) -> Finished[results.SynthesisResult]:
        """Make the calibration set."""
        return self.do(Stage(synthesize))

    def sensitivity(self, bits: BitWidths) -> Finished[results.SensitivityResult]:
        """Measure on synthetic images what the quantization of each single layer costs."""
        return self.do(Stage(sensitivity, str(bits)))

    def quantize(self, bits: BitWidths) -> Finished[results.QuantizeResult]:
        """Make one variant: quantizers, scales, fine-tuning."""
        return self.do(Stage(quantize, str(bits)))

    def export(self, variant: str) -> Finished[results.ExportResult]:
        """Write a variant's graphs, each verified against torch first."""
        return self.do(Stage(export, variant))

    def compare_graphs(self, variant: str, images: int) -> Iterator[tuple[str, float, list[SiteComparison]]]:
        """Compare a variant's graphs with torch on up to `images` synthetic images; see `stages.export`."""
        return export.compare_graphs(self, Stage(export, variant), images)

    def build(self, variant: str) -> Finished[results.BuildResult] | None:
        """Build a variant's TensorRT engine; return None if that cannot be done."""
        stage = Stage(build, variant)
        return None if unavailable(stage) else self.do(stage)

    def rtx(self, variant: str) -> Finished[results.RtxResult]:
        """Build a variant's engines of TensorRT-RTX for the GPUs that the configuration names."""
        return self.do(Stage(rtx, variant))

    def evaluate(self, variant: str) -> Finished[results.EvaluationResult]:
        """Measure a variant's accuracy in torch and as each runtime executes its graphs."""
        return self.do(Stage(evaluate, variant))

    def features(self) -> Finished[results.FeaturesResult]:
        """Compare the teacher's features of the synthetic images with those of real ones."""
        return self.do(Stage(features))

    def benchmark(self) -> Finished[results.BenchmarkResult]:
        """Time FP32 and every exported variant in turn, each as its target executes it."""
        return self.do(Stage(benchmark))

    def report(self) -> Report:
        """Write report.json, report.md and report.html from what the stages measured."""
        return report.write_report(self)
