"""Lay the teacher's features of the synthetic images beside those of real ones; the report alone reads it."""

from clusterq_deploy.errors import FeatureError, OutOfMemoryError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.features import compare_features
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.results.features import FeatureInfo
from clusterq_deploy.run.manifest import Result
from clusterq_deploy.run.run import EVALUATION_BATCH, Run
from clusterq_deploy.run.stage import Needs

NAME = "features"


def needs(_: Run, __: str) -> Needs:
    """The images."""
    return Needs(required=("synthesize",))


def inputs(run: Run, _: str) -> Result:
    """The real images."""
    return run.data_inputs


def work(run: Run, __: str) -> tuple[Result, list[str]]:
    """Compare features, in batches that fit the memory; what cannot be compared is said in the result."""
    made = run.calibration
    synthetic = EvaluationSet.from_images("synthetic images", made.images.numpy(), made.labels.numpy())

    def compared(divisor: int) -> FeatureInfo:
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
        found, _ = retry_on_oom(compared, "features")
    except (FeatureError, OutOfMemoryError) as error:
        skipped = {"skipped": str(error), "provisional": isinstance(error, OutOfMemoryError)}
        return {"inputs": run.data_inputs, **skipped}, []
    return {"inputs": run.data_inputs, "features": found.model_dump(mode="json")}, []


def describe(run: Run, _: str) -> str:
    """Count the images."""
    real = run.evaluated if run.has_own_data else 0
    return f"{run.config.synthesis.images:,} synthetic and {real:,} real images"
