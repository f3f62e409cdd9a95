"""Compare the teacher's features of synthetic and real images, for the report."""

from clusterq_deploy.errors import FeatureError, OutOfMemoryError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.features import compare_features
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.results.report import FeatureInfo
from clusterq_deploy.results.stages import FeaturesResult
from clusterq_deploy.run.run import EVALUATION_BATCH, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs

NAME, RESULT = "features", FeaturesResult


def needs(_: Run, __: AnyStage) -> Needs:
    """Require the images."""
    return Needs(required=("synthesize",))


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the real images."""
    return run.data_inputs


def work(run: Run, __: AnyStage) -> tuple[FeaturesResult, list[str]]:
    """Compare features, in batches that fit the memory; the result has the reason if that is impossible."""
    calibration = run.calibration
    synthetic = EvaluationSet.from_images("synthetic images", calibration.images.numpy(), calibration.labels.numpy())

    def attempt(divisor: int) -> FeatureInfo:
        return compare_features(
            run.model.module,
            synthetic,
            run.evaluation if run.has_own_data else None,
            classes=run.model.classes,
            seed=run.config.seed,
            batch_size=max(1, EVALUATION_BATCH // divisor),
            progress=run.progress,
        )

    try:
        features, _ = retry_on_oom(attempt, "features")
    except (FeatureError, OutOfMemoryError) as error:
        provisional = isinstance(error, OutOfMemoryError)
        return FeaturesResult(inputs=run.data_inputs, skipped=str(error), provisional=provisional), []
    return FeaturesResult(inputs=run.data_inputs, features=features), []


def describe(run: Run, _: AnyStage) -> str:
    """Count the images."""
    real = run.evaluated if run.has_own_data else 0
    return f"{run.config.synthesis.images:,} synthetic and {real:,} real images"
