"""Compare ways to prune fine-tuned models in one go: ``python scripts/prune_study.py STUDY.yaml``.

A study names a task, directories of models that were fine-tuned on it with several seeds, and ways to prune them:

    name: prune-sst2-bert-tiny
    task: {task: sst2, dataset_name: DATA}
    models: {1: outputs/sst2-seed1, 2: outputs/sst2-seed2, 3: outputs/sst2-seed3}
    sparsities: [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    recomputations: [1, 4, 16]
    options: {num_grads: 512, block_size: 128}
    contenders:
      magnitude: {options: {method: magnitude}}
      paper: {options: {selection: diagonal, update: sum}, grid: [{damping: 1e-5}, {damping: 1e-4}]}
      ours: {options: {selection: greedy, update: joint}, grid: [{damping: 1e-5}, {damping: 1e-4}]}
    tuning: {holdout_fraction: 0.02, sparsity: 0.8, recomputations: 4}

Each contender is tuned on the first model at one sparsity: the point of its grid with the lowest loss on a held-out
part of the *training* split is taken. The held-out part gives no gradients. This is done once with one gradient set,
for ``recomputations: 1``, and once with the number of recomputations in ``tuning``, for all others. Then every model
is pruned to every sparsity, without training, and judged on the validation split, which nothing before has seen.

With one gradient set, one set of costs serves all sparsities. With up to 8 recomputations (``from_dense: 8``) each
sparsity is reached from the dense model. With more, one path of that many sub-steps leads to the highest sparsity and
stops at the others, which then have had fewer. A result on a path belongs to the path up to it, so other sparsities
need new results.

``OUTPUT/NAME.jsonl`` keeps the results, which are not computed again, so a study that was cut off goes on where it
stopped. ``--models 2`` prunes some of the models only. ``OUTPUT/NAME.md`` has the table.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from mfac_hf.machine import describe_run
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from mfac_hf.pruning.blocked_step import magnitude_step, mfac_step
from mfac_hf.pruning.damping import Dampings
from mfac_hf.pruning.engine import substep_seed
from mfac_hf.pruning.gradient_source import GradientSet
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.groups import plan_groups
from mfac_hf.pruning.layout import Layout
from mfac_hf.pruning.proposal import Proposal, write_weights
from mfac_hf.storage import write_text
from mfac_hf.training.fine_tuned import FineTuned, load_fine_tuned
from mfac_hf.training.study import (
    StudyLog,
    UnsetVariableError,
    expand_variables,
    mean_and_deviation,
    read_study,
    study_parser,
)


class Contender(TypedDict, total=False):
    """A way of pruning, and what to try of it."""

    options: dict[str, Any]
    grid: list[dict[str, Any]]


class Tuning(TypedDict):
    """What is tuned on."""

    holdout_fraction: float
    sparsity: float
    recomputations: int


class Study(TypedDict, total=False):
    """The form of a study."""

    name: str
    task: dict[str, str | int | float | bool | None]
    models: dict[str | int, str]
    sparsities: list[float]
    recomputations: list[int]
    options: dict[str, Any]
    contenders: dict[str, Contender]
    tuning: Tuning


def main(argv: list[str] | None = None) -> str:
    """Compute what the study still lacks, write its table and return it."""
    parser = study_parser(__doc__)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--models", nargs="+", default=None, help="names of the models to prune now (default: all)")
    args = parser.parse_args(argv)
    try:
        study = load_study(args.study)
        if unknown := set(args.models or []) - set(study["models"]):
            raise ValueError(f"--models {' '.join(sorted(unknown))}: the study has {', '.join(study['models'])}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results = Results(args.output / f"{study['name']}.jsonl", argv)
    try:
        points = run(study, args.models or list(study["models"]), results)
    except UnsetVariableError as error:
        parser.error(str(error))
    table = format_table(study, points, results)
    write_text(args.output / f"{study['name']}.md", table)
    print(table)
    return table


def run(study: dict[str, Any], models: Sequence[str], results: Results) -> dict[tuple[str, int], Any]:
    """Tune each contender and prune these models with it; return the points that were chosen."""
    points: dict[tuple[str, int], Any] = {}
    for count in [1, *(count for count in study["recomputations"] if count != 1)]:
        chosen = {
            (name, count): tuned_point(study, name, count, results)
            for name in study["contenders"]
            if count in counts(study, name)
        }
        for model in models:
            compare(study, model, {("dense", 1): {}, **chosen}, results)
        points |= chosen
    return points


def load_study(path: Path) -> dict[str, Any]:
    """Read a study; a ValueError names the first thing that is missing or wrong."""
    keys = ("name", "task", "models", "sparsities", "recomputations", "contenders", "tuning")
    study = read_study(path, keys, Study)
    study["models"] = {str(name): value for name, value in study["models"].items()}
    study["sparsities"] = sorted(study["sparsities"])
    if not isinstance(study.setdefault("from_dense", 8), int) or study["from_dense"] < 1:
        raise ValueError(f"{path}: from_dense is {study['from_dense']!r}; expected a whole number, at least 1")
    for count in study["recomputations"]:
        if study["from_dense"] < count < len(study["sparsities"]):
            raise ValueError(
                f"{path}: {count} recomputations cannot stop at {len(study['sparsities'])} sparsities; raise "
                f"from_dense to {count}, or name fewer sparsities"
            )
    for name, contender in study["contenders"].items():
        contender["options"] = {**study.get("options", {}), **contender.get("options", {})}
        try:
            contender["grid"] = [
                {key: float(value) if key == "damping" else value for key, value in point.items()}
                for point in contender.get("grid", [{}])
            ]
            for point in contender["grid"]:
                PruningOptions(**contender["options"], **point)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: contender {name!r}: {error}") from error
    return study


def counts(study: dict[str, Any], name: str) -> list[int]:
    """Numbers of recomputations to prune with; for magnitude pruning, where they change nothing, 1 alone."""
    return [1] if is_magnitude(study, name) else study["recomputations"]


def is_magnitude(study: dict[str, Any], name: str) -> bool:
    """Whether a contender prunes by magnitude."""
    return bool(study["contenders"][name]["options"].get("method") == "magnitude")


class Results(StudyLog):
    """The study's log; each result comes with what it takes to repeat it."""

    def __init__(self, path: Path, argv: Sequence[str] | None) -> None:
        super().__init__(path)
        self.argv = argv

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a result, and print it."""
        print(key, {name: row[name] for name in ("metric", "loss")}, flush=True)
        return super().add(key, {**row, **describe_run(self.argv, torch.device("cpu"))})


class Pruner:
    """A fine-tuned model that is pruned again and again from its dense weights."""

    def __init__(self, study: dict[str, Any], model: str, holdout_fraction: float | None = None) -> None:
        folder = expand_variables(study["models"][model])
        task = {k: expand_variables(value) if isinstance(value, str) else value for k, value in study["task"].items()}
        self.task: FineTuned = load_fine_tuned(folder, **task, holdout_fraction=holdout_fraction)
        self.model, self.from_dense = self.task.model, study["from_dense"]
        self.dense = copy.deepcopy(self.model.state_dict())

    def restart(self) -> MaskSet:
        """The dense model again, and masks that keep all of it."""
        self.model.load_state_dict(self.dense)
        return MaskSet.dense(self.model, find_targets(self.model))

    def source(self, options: PruningOptions) -> DataLoaderGradients:
        """The gradients that these options ask for."""
        return DataLoaderGradients.of_options(self.task.loader(), options)

    def measure(self) -> dict[str, float]:
        """Metric and loss of the model as it is now."""
        metrics = self.task.evaluate()
        return {"metric": metrics[self.task.metric], "loss": metrics["eval_loss"]}

    def at_once(
        self, sparsities: Sequence[float], options: PruningOptions, dampings: Sequence[float]
    ) -> Iterator[tuple[Proposal, dict[str, Any]]]:
        """Prune to every sparsity with every damping, from one gradient set; the model is each proposal in turn."""
        masks, started = self.restart(), time.perf_counter()
        parameters = masks.parameters(self.model)
        layout = Layout.of(self.model, parameters)
        if options.method == "magnitude":
            proposals = magnitude_step(parameters, masks, sparsities, options, layout)
        else:
            source = self.source(options)
            proposals = mfac_step(
                parameters,
                masks,
                sparsities,
                options,
                GradientSet(source, self.model, options.num_grads, substep_seed(options.seed, 1)),
                groups=plan_groups(parameters, options, source),
                dampings=Dampings(tuple(dampings)) if dampings else Dampings.of_options(options),
                layout=layout,
            )
        seconds = (time.perf_counter() - started) / len(proposals)
        for proposal in proposals:
            with torch.no_grad():
                write_weights(parameters, proposal.weights)
            yield proposal, {"seconds": seconds, "predicted_loss_increase": proposal.predicted_loss_increase}

    def in_substeps(
        self, sparsities: Sequence[float], options: PruningOptions
    ) -> Iterator[tuple[float, dict[str, Any]]]:
        """Prune to every sparsity with recomputations; the model is at each in turn."""
        source, masks = self.source(options), self.restart()
        for sparsity, steps in substeps(sparsities, options.recomputations, self.from_dense):
            if options.recomputations <= self.from_dense:
                masks = self.restart()
            seed = options.seed + round(1000 * sparsity)
            chosen = dataclasses.replace(options, recomputations=steps, seed=seed)
            report = prune_to(self.model, masks, source, sparsity, chosen, progress=False)
            yield (
                sparsity,
                {
                    "seconds": report.seconds,
                    "predicted_loss_increase": report.predicted_loss_increase,
                    "substeps": steps,
                },
            )


def substeps(sparsities: Sequence[float], recomputations: int, from_dense: int) -> list[tuple[float, int]]:
    """Sub-steps to each sparsity: from the dense model, or on one path that is nearly geometric in the density.

    >>> substeps([0.5, 0.9], 4, from_dense=8)
    [(0.5, 4), (0.9, 4)]
    >>> substeps([0.5, 0.9], 16, from_dense=8)
    [(0.5, 5), (0.9, 11)]
    """
    if recomputations <= from_dense:
        return [(sparsity, recomputations) for sparsity in sparsities]
    last, done, path = math.log(1 - sparsities[-1]), 0, []
    for sparsity in sparsities:
        reached = max(done + 1, round(recomputations * math.log(1 - sparsity) / last))
        path.append((sparsity, reached - done))
        done = reached
    return path


def tuned_point(study: dict[str, Any], name: str, count: int, results: Results) -> dict[str, Any]:
    """The point of a contender's grid with the lowest loss on held-out training examples."""
    contender, tuning = study["contenders"][name], study["tuning"]
    if len(contender["grid"]) == 1:
        return contender["grid"][0]
    tried = 1 if count == 1 else tuning["recomputations"]
    model = next(iter(study["models"]))

    def key(point: dict[str, Any]) -> dict[str, Any]:
        return {"phase": "tuning", "contender": name, "recomputations": tried, "point": point}

    missing = [point for point in contender["grid"] if results.find(**key(point)) is None]
    pruner = Pruner(study, model, tuning["holdout_fraction"]) if missing else None
    for point in missing:
        if results.find(**key(point)) is not None:
            continue  # it came along with another point
        assert pruner is not None
        options = PruningOptions(**contender["options"], **point, recomputations=tried, seed=99)
        if tried > 1:
            for _, took in pruner.in_substeps([tuning["sparsity"]], options):
                results.add(key(point), took | pruner.measure())
            continue
        # Points that differ in the damping alone share their gradients.
        alike = [other for other in missing if other | {"damping": 0} == point | {"damping": 0}]
        for proposal, took in pruner.at_once([tuning["sparsity"]], options, [other["damping"] for other in alike]):
            results.add(key(point | {"damping": proposal.damping}), took | pruner.measure())
    losses = [(results.find(**key(point)) or {}).get("loss", math.inf) for point in contender["grid"]]
    return contender["grid"][
        min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    ]


def result_keys(
    study: dict[str, Any], model: str, name: str, count: int, point: dict[str, Any]
) -> dict[float, dict[str, Any]]:
    """By sparsity, the keys under which a model's results are kept."""
    key = {"phase": "result", "model": model, "contender": name, "recomputations": count}
    sparsities = [0.0] if name == "dense" else study["sparsities"]
    keys = {sparsity: key | {"sparsity": sparsity, "point": point} for sparsity in sparsities}
    if count > study["from_dense"]:
        path = substeps(study["sparsities"], count, study["from_dense"])
        for stop, (sparsity, _) in enumerate(path, start=1):
            keys[sparsity]["path"] = [list(step) for step in path[:stop]]
    return keys


def compare(study: dict[str, Any], model: str, points: dict[tuple[str, int], Any], results: Results) -> None:
    """Prune one model in every way to every sparsity, and judge each result on the validation split."""
    pruner: Pruner | None = None
    for (name, count), point in points.items():
        keys = result_keys(study, model, name, count, point)
        missing = [sparsity for sparsity, key in keys.items() if results.find(**key) is None]
        if not missing:
            continue
        pruner = pruner or Pruner(study, model)
        if name == "dense":
            pruner.restart()
            results.add(keys[0.0], pruner.measure())
            continue
        options = PruningOptions(
            **study["contenders"][name]["options"],
            **point,
            recomputations=count,
            seed=list(study["models"]).index(model),
        )
        if count == 1:
            for proposal, took in pruner.at_once(missing, options, []):
                results.add(keys[proposal.level], took | pruner.measure())
            continue
        stops = study["sparsities"] if count > study["from_dense"] else missing
        for sparsity, took in pruner.in_substeps(stops, options):
            if sparsity in missing:
                results.add(keys[sparsity], took | pruner.measure())


def format_table(study: dict[str, Any], points: dict[tuple[str, int], Any], results: Results) -> str:
    """The results as Markdown: mean ± standard deviation over the models, of the metric and of the loss."""
    lines = [
        f"# {study['name']}",
        "",
        f"{study['task']['task']}, models {', '.join(study['models'])}; pruned without training. Points chosen by the "
        f"loss on a held-out {study['tuning']['holdout_fraction']:g} of the training split at "
        f"{study['tuning']['sparsity']:.0%}; the tables are on the validation split.",
    ]

    def cells(column: str, name: str, count: int, point: dict[str, Any]) -> list[str]:
        keys = [result_keys(study, model, name, count, point) for model in study["models"]]
        found = [[row[column] for key in keys if (row := results.find(**key[sparsity]))] for sparsity in keys[0]]
        return [_cell(values, column) for values in found]

    rows = [(name, count) for name in study["contenders"] for count in counts(study, name)]
    for column in ("metric", "loss"):
        lines += [
            "",
            f"{column.capitalize()}; dense: {cells(column, 'dense', 1, {})[0]}.",
            "",
            "| method | recomputations | chosen | " + " | ".join(f"{s:.0%}" for s in study["sparsities"]) + " |",
            "| --- | --- | --- |" + " --- |" * len(study["sparsities"]),
        ]
        for name, count in rows:
            point = points[name, count]
            chosen = ", ".join(f"{key} {value:g}" for key, value in point.items())
            shown = [name, "" if is_magnitude(study, name) else str(count), chosen, *cells(column, name, count, point)]
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], column: str) -> str:
    if not values:
        return ""
    if column == "loss":
        return mean_and_deviation(values, digits=3)
    return mean_and_deviation([100 * value if abs(value) <= 1 else value for value in values])


if __name__ == "__main__":
    main()
