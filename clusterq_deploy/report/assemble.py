"""From the records of finished stages to a report."""

import datetime
from collections.abc import Mapping
from operator import itemgetter

import torch

from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.models import LoadedModel
from clusterq_deploy.results.engines import EngineInspection
from clusterq_deploy.results.features import FeatureInfo
from clusterq_deploy.results.histograms import LayerHistograms
from clusterq_deploy.results.report import (
    Accuracy,
    Artifact,
    CalibrationInfo,
    Environment,
    EvaluationInfo,
    ImageNote,
    Latency,
    LayerNote,
    LayerSensitivity,
    ModelInfo,
    Report,
    Skipped,
    Variant,
)
from clusterq_deploy.run.manifest import StageRecord
from clusterq_deploy.version import __version__

_CURVE_POINTS = 200


def assemble(
    records: Mapping[str, StageRecord],
    *,
    config: RunConfig,
    model: LoadedModel,
    data: EvaluationSet,
    device: torch.device,
    commands: list[list[str]],
    skipped: list[Skipped],
    preview_classes: list[str],
) -> Report:
    """The report of what has been done so far.

    Args:
        records: finished stages by name: synthesize, features, benchmark, and sensitivity/V, quantize/V, export/V,
            build/V, evaluate/V.
        config, model, data, device: of the run.
        commands: the command lines that did the stages, in order.
        skipped: stages that did not run, and why.
        preview_classes: what the columns of the preview show.
    """
    made, timed = records.get("synthesize"), records.get("benchmark")
    compared = records["features"].result.get("features") if "features" in records else None
    features = FeatureInfo.model_validate(compared) if compared else None
    calibration = CalibrationInfo(
        images=made.result["images"] if made else 0,
        seconds=made.seconds if made else 0.0,
        teacher_top1=made.result["teacher_top1"] if made else 0.0,
        recipe=made.result["recipe"] if made else config.synthesis.recipe,
        within_class_diversity=made.result["within_class_diversity"] if made else None,
        silhouette=features.synthetic.silhouette if made and features else None,
        losses={name: thin(values) for name, values in made.result["losses"].items()} if made else {},
        batch_divisor=made.result.get("batch_divisor", 1) if made else 1,
        preview_classes=preview_classes,
    )
    return Report(
        schema=1,
        command=commands[-1],
        seed=config.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        clusterq_deploy=__version__,
        environment=Environment.model_validate(timed.result["environment"]) if timed else collect_environment(device),
        model=ModelInfo(
            name=model.name,
            parameters=model.parameters,
            input_size=model.input.size,
            classes=model.classes,
            weights=model.weights,
        ),
        calibration=calibration,
        evaluation=_evaluation(data, records),
        variants=[_variant(name, records) for name in ("fp32", *config.bits) if f"export/{name}" in records],
        skipped=skipped,
        features=features,
        config=config.model_dump(mode="json"),
        commands=commands,
    )


def _evaluation(data: EvaluationSet, records: Mapping[str, StageRecord]) -> EvaluationInfo:
    """What accuracy was measured on, less what could not be read, as any stage tells that read as many images."""
    told = [record.result.get("unreadable") for name, record in records.items() if name.startswith("evaluate/")]
    found = [(own["count"], own["files"]) for own in told if own and own["total"] == len(data)]
    count, files = max(found, key=itemgetter(0), default=(0, []))
    return EvaluationInfo(
        dataset=data.name,
        images=len(data) - count,
        labelled=data.labelled,
        unreadable=count,
        unreadable_files=[ImageNote.model_validate(own) for own in files],
    )


def _variant(name: str, records: Mapping[str, StageRecord]) -> Variant:
    stages = ("sensitivity", "quantize", "export", "build", "evaluate")
    own = {s: records[f"{s}/{name}"] for s in stages if f"{s}/{name}" in records}
    costs = own["sensitivity"].result["layers"] if "sensitivity" in own else []
    artifacts = []
    for stage in ("export", "build"):
        for artifact in own[stage].result["artifacts"] if stage in own else []:
            sha256 = own[stage].files[artifact["path"]]
            artifacts.append(Artifact.model_validate({**artifact, "sha256": sha256}))
    timed = records["benchmark"].result["latency"].get(name, []) if "benchmark" in records else []
    inspected = records["benchmark"].result.get("inspections", {}).get(name, []) if "benchmark" in records else []
    tuned = own["quantize"].result if "quantize" in own else {}
    return Variant(
        name=name,
        seconds=sum(record.seconds for stage, record in own.items() if stage not in {"evaluate", "sensitivity"}),
        accuracy=[Accuracy.model_validate(a) for a in own["evaluate"].result["accuracy"]] if "evaluate" in own else [],
        artifacts=artifacts,
        latency=[Latency.model_validate(entry) for entry in timed],
        inspections=[EngineInspection.model_validate(own) for own in inspected],
        quantized_layers=tuned.get("quantized_layers"),
        skipped_layers=[LayerNote.model_validate(note) for note in tuned.get("skipped_layers", [])],
        keep=tuned.get("keep", {}),
        expected_drop=tuned.get("expected_drop"),
        max_drop=tuned.get("max_drop"),
        sensitivities=[LayerSensitivity(layer=c["layer"], bits=c["bits"], **c["cost"]) for c in costs],
        histograms=[LayerHistograms.model_validate(own) for own in tuned.get("histograms", [])],
        losses={key: thin(values) for key, values in tuned.get("losses", {}).items()},
        batch_divisor=tuned.get("batch_divisor", 1),
        cpu=tuned.get("cpu"),
        kept_step=tuned.get("kept_step") if tuned.get("losses", {}).get("held_out_kl") else None,
    )


def thin(values: list[float]) -> list[float]:
    """At most 200 of a curve's points, evenly spaced, the last one among them."""
    stride = -(-len(values) // _CURVE_POINTS) or 1
    return values[::-stride][::-1]
