"""Write a model card, in words and tables, from the facts that `mfac_hf.hub.facts` gathered."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mfac_hf.hub.run_records import UNTRAINED, MissingResultsError
from mfac_hf.hub_names import GLUE, SQUAD

__all__ = ["build_card"]

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
METRIC_NAMES = {"f1": "F1", "exact_match": "exact match", "matthews_correlation": "Matthews correlation"}
_FACTS = ("name", "model", "weights", "files", "runs", "mfac_hf")


def build_card(facts: Mapping[str, Any], repo_id: str | None = None, *, sparse_only: bool = False) -> ModelCard:
    """Write the card of a model.

    Args:
        facts: what `mfac_hf.hub.facts.collect` returned.
        repo_id: name on the Hub that the code in the card loads; the model's name where it is None.
        sparse_only: whether the repository has the sparse file without the ordinary one.

    Returns:
        The card, parsed and checked by ``huggingface_hub``. Its metadata has the results of the first run as
        ``EvalResult``.

    Raises:
        MissingResultsError: ``facts`` lack something that a card has to say; the message names it.
    """
    if lacking := [key for key in _FACTS if not facts.get(key)]:
        raise MissingResultsError(
            f"the facts of the card lack {', '.join(lacking)}; make them with collect or mfac card"
        )
    run, sparse = facts["runs"][0], facts["sparse"]
    dataset = (run["dataset"] or {}).get("id")
    tags = ["mfac_hf"]
    if sparse:
        tags += ["sparse", "pruned"]
    if uses_mfac := _uses_mfac(run):
        tags += ["m-fac", "arxiv:2107.03356"]
    data = ModelCardData(
        model_name=facts["name"],
        eval_results=_eval_results(facts) or None,
        library_name=facts["model"]["library"],
        pipeline_tag=facts["model"]["task"],
        license=facts.get("license"),
        language="en" if str(dataset).startswith((GLUE, *SQUAD.values())) else None,
        datasets=dataset if dataset and "/" in dataset else None,
        base_model=facts.get("base_model"),
        metrics=sorted({_metric_id(name) for name in run["metrics"]}),
        tags=tags,
    )
    words = {
        "title": facts["name"],
        "summary": _summary(facts),
        "results": _results(facts),
        "sparse": sparse,
        "sparsity": _sparsity(facts["weights"]),
        "layers": _layers(facts["weights"]),
        "files": _files(facts),
        "latency": _latency(facts),
        "load": _load_snippet(facts, repo_id or facts["name"], sparse_only),
        "finetune": _finetune_snippet(),
        "training": _training(facts),
        "commands": [_command(r) for r in facts["runs"]],
        "dense_commands": [_command(r) for r in facts["dense_runs"]],
        "dense_optimizer": facts["dense_runs"][0]["optimizer"]["name"] if facts["dense_runs"] else None,
        "environment": _environment(run),
        "caveats": "\n".join(f"- {text}" for text in facts.get("caveats") or ["None were given with the results."]),
        "uses_mfac": uses_mfac,
        "version": facts["mfac_hf"],
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **words)
    return ModelCard(str(card))  # parsed back: what the Hub would refuse fails here


def _uses_mfac(run: Mapping[str, Any]) -> bool:
    """Whether M-FAC trained the model or chose what to prune."""
    options = (run["pruning"] or {}).get("options", {})
    return run["optimizer"]["name"] == "M-FAC" or "mfac" in (options.get("method"), options.get("pruner"))


def _eval_results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """Return the metrics of the first run, in full precision; none where the data set is not known."""
    run = facts["runs"][0]
    dataset = run["dataset"]
    if not dataset or not facts["model"]["task"]:
        return []  # the Hub takes no result without these
    return [
        EvalResult(
            task_type=facts["model"]["task"],
            dataset_type=dataset["id"],
            dataset_name=" ".join(filter(None, [dataset["id"].rpartition("/")[2], dataset.get("config")])),
            dataset_config=dataset.get("config"),
            dataset_split=run["split"] or None,
            metric_type=_metric_id(name),
            metric_name=_metric_name(name),
            metric_value=value,
        )
        for name, value in run["metrics"].items()
    ]


def _metric_id(name: str) -> str:
    """Return a metric's name on the Hub, without the prefix of MNLI's two splits."""
    return name.removeprefix("matched_").removeprefix("mismatched_")


def _metric_name(name: str) -> str:
    return METRIC_NAMES.get(name, name.replace("_", " "))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float) -> str:
    """Format a share in percent, and what is in percent already (SQuAD's metrics) as it is."""
    return f"{100 * value:.2f}" if abs(value) <= 1 else f"{value:.2f}"


def _summary(facts: Mapping[str, Any]) -> str:
    run, weights = facts["runs"][0], facts["weights"]
    kind = facts["model"]["class"].rpartition(".")[2]
    how = (
        "pruned without training"
        if run["optimizer"]["name"] == UNTRAINED
        else f"trained with {run['optimizer']['name']}"
    )
    words = f"{kind}, {how}"
    if run["base_model"]:
        words += f" from `{run['base_model']}`"
    if facts["sparse"]:
        words += f"; {_share(weights['targets'])} of the pruned layers' weights are zero"
    return f"{words}."


def _results(facts: Mapping[str, Any]) -> str:
    """Write each metric of this model, and its mean and standard deviation over the seeds, dense and sparse."""
    runs, dense = facts["runs"], facts["dense_runs"]
    if not runs[0]["metrics"]:
        return "These weights had not been evaluated when the card was written."
    groups = [("sparse" if facts["sparse"] else "this model", runs)]
    if dense:
        groups.append(("dense", dense))
    elif facts["sparse"] and all(run["dense_metrics"] for run in runs):
        groups.append(("dense", [{**run, "metrics": run["dense_metrics"]} for run in runs]))
    rows = []
    for title, group in groups:
        for name in runs[0]["metrics"]:
            values = [run["metrics"][name] for run in group]
            spread = (
                f"{_percent(statistics.mean(values))} ± {_percent(statistics.stdev(values))}" if values[1:] else "-"
            )
            first = _percent(values[0])
            rows.append([title, _metric_name(name), first, spread, ", ".join(str(run["seed"]) for run in group)])
    dataset = runs[0]["dataset"]
    place = "" if not dataset else f" on `{' '.join(filter(None, [dataset['id'], dataset.get('config')]))}`"
    split = f", {runs[0]['split']} split" if runs[0]["split"] else ""
    header = ["", "metric", "first seed", "mean ± std", "seeds"]
    missing = ""
    if facts["sparse"] and len(groups) == 1:
        missing = "\n\nThe dense model was not measured beside it."
    return (
        f"Measured{place}{split}, in percent. The weights here are those of seed {runs[0]['seed']}.\n\n"
        f"{_table(header, rows)}{missing}"
    )


def _share(counts: Mapping[str, int]) -> str:
    return f"{counts['zeros'] / counts['numel']:.2%}"


def _sparsity(weights: Mapping[str, Any]) -> str:
    targets = weights["targets"]
    rows = [
        ["layers that were pruned", f"{targets['numel']:,}", f"{targets['zeros']:,}", _share(targets)],
        ["all weights", f"{weights['numel']:,}", f"{weights['zeros']:,}", _share(weights)],
    ]
    return _table(["", "weights", "zeros", "sparsity"], rows)


def _layers(weights: Mapping[str, Any]) -> str:
    rows = [
        [f"`{t['name']}`", " x ".join(map(str, t["shape"])), _share(t), "yes" if t["target"] else "no"]
        for t in weights["tensors"]
    ]
    return _table(["tensor", "shape", "sparsity", "pruned"], rows)


def _files(facts: Mapping[str, Any]) -> str:
    rows = [[f"`{name}`", f"{size:,}"] for name, size in facts["files"].items()]
    return _table(["file", "bytes"], rows)


def _latency(facts: Mapping[str, Any]) -> str:
    latency = facts["latency"]
    if latency is None:
        return "Latency was not measured."
    dense = latency["seconds"]["dense"]
    text = f"A forward pass of {latency['example']} takes {1000 * dense:.1f} ms dense in PyTorch {latency['torch']}"
    if latency["sparse_layers"] == 0 and facts["sparse"]:
        text += "; no layer was faster as a sparse one"
    elif "sparse" in latency["seconds"]:
        sparse = latency["seconds"]["sparse"]
        text += f", {1000 * sparse:.1f} ms after `to_sparse_inference` ({latency['sparse_layers']} sparse layers)"
    threads = "1 thread" if latency["threads"] == 1 else f"{latency['threads']} threads"
    where = f"{latency['hardware']}, {threads}, median of {latency['calls']} calls"
    return f"{text}; {where}. Zeros alone make no model faster."


def _auto_class(path: str) -> tuple[str, str]:
    """Return module and class that load the model: transformers' automatic class where there is one."""
    module, _, name = path.rpartition(".")
    if module == "transformers":
        import transformers

        automatic = f"AutoModelFor{name.partition('For')[2]}"
        return module, automatic if hasattr(transformers, automatic) else name
    return module, name


def _load_snippet(facts: Mapping[str, Any], where: str, sparse_only: bool) -> str:
    module, name = _auto_class(facts["model"]["class"])
    lines = [f"from {module} import {name}", "", f'model = {name}.from_pretrained("{where}")']
    small = ["from mfac_hf import load_sparse, to_sparse_inference", f"from {module} import {name}", ""]
    if module == "transformers":
        small += [f'model = load_sparse("{where}", {name})  # downloads the small file only']
    else:
        small += [f'weights = load_sparse("{where}")  # a state dict; downloads the small file only']
    if not facts["sparse"]:
        return "\n".join(lines)
    if module == "transformers":
        small += ["model = to_sparse_inference(model)  # sparse layers where they are faster on this machine"]
    else:
        small[0] = "from mfac_hf import load_sparse"
        small = small[:1] + small[2:]
    return "\n".join(small if sparse_only else [*lines, "", "# or", *small])


def _finetune_snippet() -> str:
    return "\n".join(
        [
            "from mfac_hf import MFAC",
            "from mfac_hf.pruning import masks_from_sparse_model",
            "",
            "optimizer = MFAC(model.parameters(), lr=1e-3, num_grads=256, damping=1e-3, grad_decay=0.9,",
            '                 normalize="count", masks=masks_from_sparse_model(model))',
        ]
    )


def _training(facts: Mapping[str, Any]) -> str:
    run = facts["runs"][0]
    settings = [[name, _plain(value)] for name, value in {**run["optimizer"], **run["training"]}.items()]
    settings[0][0] = "optimizer"
    text = _table(["", ""], settings)
    pruning = run["pruning"]
    if pruning:
        options = [[name, _plain(value)] for name, value in pruning["options"].items() if value is not None]
        steps = [[_plain(value) for value in step.values()] for step in pruning["steps"]]
        text += f"\n\nPruning:\n\n{_table(['', ''], options)}"
        if steps:
            text += f"\n\n{_table(list(pruning['steps'][0]), steps)}"
    elif facts["sparse"]:
        text += "\n\nHow the zeros came about is not recorded in the result files of these runs."
    return text


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _command(run: Mapping[str, Any]) -> str:
    return f"python {shlex.join(run['command'])}"


def _environment(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    took = [f"device {run['device']}"]
    if run["threads"]:
        took.append(f"threads {run['threads']}")
    if run["wall_seconds"]:
        took.append(f"{run['wall_seconds']:.0f} s")
    if run["peak_memory_gib"]:
        took.append(f"peak memory {run['peak_memory_gib']:.2f} GiB")
    return f"{versions}; {', '.join(took)}."
