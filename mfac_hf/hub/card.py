"""Write a model card, in words and tables, from the facts that `mfac_hf.hub.facts` gathered."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mfac_hf.hub.card_text import adapter_contents, code, fenced, one_line, plain, sentence, table
from mfac_hf.hub.facts import check_consistent
from mfac_hf.hub.run_records import NOT_TRAINED, UNTRAINED, MissingResultsError
from mfac_hf.hub.schemas import Facts
from mfac_hf.hub.snippets import FINETUNE_SNIPPET, load_snippet
from mfac_hf.hub_names import GLUE, SQUAD
from mfac_hf.schema import check_schema

__all__ = ["build_card", "check_facts"]

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
METRIC_NAMES = {"f1": "F1", "exact_match": "exact match", "matthews_correlation": "Matthews correlation"}
# Metrics that end with these are neither shares nor in percent.
_NO_SHARES = ("loss", "perplexity", "mse", "rmse", "mae", "error")
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
        ValueError: ``facts`` have another form, or their runs do not belong together.
    """
    check_facts(facts)
    run, sparse = facts["runs"][0], facts["sparse"]
    adapter = facts["model"].get("adapter")
    dataset = (run["dataset"] or {}).get("id")
    tags = ["mfac_hf"]
    if sparse:
        tags += ["sparse", "pruned"]
    if uses_mfac := _uses_mfac(run):
        tags += ["m-fac", "arxiv:2107.03356"]
    if adapter is not None:
        tags.append(adapter["type"].lower())
        if facts.get("base_model"):
            tags.append(f"base_model:adapter:{facts['base_model']}")
    data = ModelCardData(
        model_name=one_line(facts["name"]),
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
        "title": plain(facts["name"]),
        "summary": _summary(facts),
        "results": _results(facts),
        "sparse": sparse,
        "sparsity": _sparsity(facts["weights"]),
        "layers": _layers(facts["weights"]),
        "files": _files(facts),
        "latency": _latency(facts),
        "load": fenced(load_snippet(facts, repo_id or facts["name"], sparse_only), "python"),
        "finetune": fenced(FINETUNE_SNIPPET, "python"),
        "training": _training(facts),
        "commands": fenced("\n\n".join(_command(r) for r in facts["runs"])),
        "several": len(facts["runs"]) > 1,
        "dense_commands": fenced("\n\n".join(_command(r) for r in facts["dense_runs"])) if facts["dense_runs"] else "",
        "dense_optimizer": _optimizer_name(facts["dense_runs"][0]) if facts["dense_runs"] else None,
        "environment": _environment(run),
        "caveats": "\n".join(f"- {sentence(text)}" for text in _caveats(facts)),
        "uses_mfac": uses_mfac,
        "version": plain(facts["mfac_hf"]),
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **words)
    return ModelCard(str(card))  # parsed back: what the Hub would refuse fails here


def check_facts(facts: Any, name: str = "the facts of the card") -> None:
    """Raise an error unless these are facts that a card can be written from.

    Args:
        facts: the content of a ``card.json``.
        name: name of the file, for the message.

    Raises:
        MissingResultsError: something is missing; the message names it.
        ValueError: something has another form, or the runs do not belong together.
    """
    if not isinstance(facts, Mapping):
        raise ValueError(f"{name} are a {type(facts).__name__}; expected an object, as mfac card writes it")
    if lacking := [key for key in _FACTS if not facts.get(key)]:
        owner = name if name.startswith("the facts") else f"{name}: the facts of the card"
        raise MissingResultsError(f"{owner} lack {', '.join(lacking)}; make them with collect or mfac card")
    check_schema(facts, Facts, name)
    try:
        check_consistent(facts["runs"], facts["dense_runs"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


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


def _caveats(facts: Mapping[str, Any]) -> list[str]:
    caveats = list(facts.get("caveats") or ["None were given with the results."])
    if "adapter" in facts["model"] and facts["runs"][0]["pruning"]:
        caveats.append("The pruning removed weights of the base model, which are not part of this repository.")
    return caveats


def _has_percent(name: str) -> bool:
    """Whether a metric is a share or in percent, as opposed to a loss or an error."""
    return not name.endswith(_NO_SHARES)


def _number(values: list[float], task: str | None, name: str) -> Callable[[float], str]:
    """Return how to write the values of a metric: a share in percent, and what is in percent already as it is."""
    if not _has_percent(name):
        return lambda value: f"{value:.4g}"
    scale = 1 if task in SQUAD or any(abs(value) > 1 for value in values) else 100
    return lambda value: f"{scale * value:.2f}"


def _summary(facts: Mapping[str, Any]) -> str:
    run, weights = facts["runs"][0], facts["weights"]
    kind = facts["model"]["class"].rpartition(".")[2]
    if adapter := facts["model"].get("adapter"):
        kind = f"{plain(adapter['type'])} adapter ({weights['numel']:,} weights)"
    how = {UNTRAINED: "pruned without training", NOT_TRAINED: "not trained in this run"}
    words = f"{plain(kind)}, {how.get(run['optimizer']['name'], 'trained with ' + _optimizer_name(run))}"
    if run["base_model"]:
        words += f" from {code(run['base_model'])}" if not adapter else f" on top of {code(run['base_model'])}"
    if parameters := run.get("parameters"):
        words += (
            f"; {parameters['trainable_parameters']:,} of {parameters['total_parameters']:,} parameters were trained"
        )
    if facts["sparse"]:
        words += f"; {_share(weights['targets'])} of the pruned layers' weights are zero"
    return f"{words}."


def _optimizer_name(run: Mapping[str, Any]) -> str:
    name = plain(run["optimizer"]["name"])
    return f"{name} in Adam's metric" if run["optimizer"].get("metric") == "adam" else name


def _results(facts: Mapping[str, Any]) -> str:
    """Write each metric of this model, and its mean and standard deviation over the seeds, dense and sparse."""
    runs, dense = facts["runs"], facts["dense_runs"]
    metrics = list(runs[0]["metrics"])
    if not_finite := runs[0].get("not_finite"):
        return f"The evaluation gave no finite number for {', '.join(map(plain, not_finite))}: the run diverged."
    if not metrics:
        return "These weights had not been evaluated when the card was written."
    groups = [("sparse" if facts["sparse"] else "this model", runs)]
    if dense:
        groups.append(("dense", dense))
    elif facts["sparse"] and all(run["dense_metrics"] for run in runs):
        groups.append(("dense", [{**run, "metrics": run["dense_metrics"]} for run in runs]))
    rows = []
    for title, group in groups:
        for name in metrics:
            shown = _number([run["metrics"][name] for _, one in groups for run in one], runs[0]["task"], name)
            values = [run["metrics"][name] for run in group]
            spread = f"{shown(statistics.mean(values))} ± {shown(statistics.stdev(values))}" if values[1:] else "-"
            seeds = ", ".join(str(run["seed"]) for run in group)
            rows.append([title, plain(_metric_name(name)), shown(values[0]), spread, seeds])
    dataset = runs[0]["dataset"]
    place = "" if not dataset else f" on {code(' '.join(filter(None, [dataset['id'], dataset.get('config')])))}"
    split = f", {plain(runs[0]['split'])} split" if runs[0]["split"] else ""
    others = [plain(_metric_name(name)) for name in metrics if not _has_percent(name)]
    percent = ", in percent" if len(others) < len(metrics) else ""
    if percent and others:
        percent += f" but for {', '.join(others)}"
    missing = ""
    if facts["sparse"] and len(groups) == 1:
        missing = "\n\nThe dense model was not measured beside it."
    return (
        f"Measured{place}{split}{percent}. The weights here are those of seed {runs[0]['seed']}.\n\n"
        f"{table(['', 'metric', 'first seed', 'mean ± std', 'seeds'], rows)}{missing}"
    )


def _share(counts: Mapping[str, int]) -> str:
    return f"{counts['zeros'] / max(counts['numel'], 1):.2%}"


def _sparsity(weights: Mapping[str, Any]) -> str:
    targets = weights["targets"]
    rows = [
        ["layers that were pruned", f"{targets['numel']:,}", f"{targets['zeros']:,}", _share(targets)],
        ["all weights", f"{weights['numel']:,}", f"{weights['zeros']:,}", _share(weights)],
    ]
    return table(["", "weights", "zeros", "sparsity"], rows)


def _layers(weights: Mapping[str, Any]) -> str:
    rows = [
        [code(t["name"]), " x ".join(map(str, t["shape"])), _share(t), "yes" if t["target"] else "no"]
        for t in weights["tensors"]
    ]
    return table(["tensor", "shape", "sparsity", "pruned"], rows)


def _files(facts: Mapping[str, Any]) -> str:
    rows = [[code(name), f"{size:,}"] for name, size in facts["files"].items()]
    return table(["file", "bytes"], rows) + adapter_contents(facts)


def _latency(facts: Mapping[str, Any]) -> str:
    latency = facts["latency"]
    if latency is None:
        return "Latency was not measured."
    dense = latency["seconds"]["dense"]
    text = (
        f"A forward pass of {plain(latency['example'])} takes {1000 * dense:.1f} ms dense in PyTorch "
        f"{plain(latency['torch'])}"
    )
    if latency["sparse_layers"] == 0 and facts["sparse"]:
        text += "; no layer was faster as a sparse one"
    elif "sparse" in latency["seconds"]:
        sparse = latency["seconds"]["sparse"]
        text += f", {1000 * sparse:.1f} ms after `to_sparse_inference` ({latency['sparse_layers']} sparse layers)"
    threads = "1 thread" if latency["threads"] == 1 else f"{latency['threads']} threads"
    where = f"{plain(latency['hardware'])}, {threads}, median of {latency['calls']} calls"
    return f"{text}; {where}. Zeros alone make no model faster."


def _training(facts: Mapping[str, Any]) -> str:
    run = facts["runs"][0]
    optimizer = {"optimizer": run["optimizer"]["name"]}
    if optimizer["optimizer"] == "M-FAC":
        optimizer["metric"] = "identity"  # of runs from before there was another one, which do not name theirs
    optimizer |= {**run["optimizer"], **run["training"]}
    settings = [[plain(key), _setting(value)] for key, value in optimizer.items() if key != "name"]
    if adapter := facts["model"].get("adapter"):
        settings += [[plain(name), _setting(value)] for name, value in adapter["settings"].items()]
    text = table(["", ""], settings)
    pruning = run["pruning"]
    if pruning:
        options = [[plain(name), _setting(value)] for name, value in pruning["options"].items() if value is not None]
        header = list(dict.fromkeys(name for step in pruning["steps"] for name in step))
        steps = [[_setting(step[name]) if name in step else "" for name in header] for step in pruning["steps"]]
        text += f"\n\nPruning:\n\n{table(['', ''], options)}"
        if steps:
            text += f"\n\n{table([plain(name) for name in header], steps)}"
    elif facts["sparse"]:
        text += "\n\nHow the zeros came about is not recorded in the result files of these runs."
    return text


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(map(_setting, value)) if isinstance(value, list) else plain(str(value))


def _command(run: Mapping[str, Any]) -> str:
    words = shlex.join(run["command"])
    if run.get("launcher"):
        return f"{run['launcher']} {words}"
    return words if run["command"][:1] == ["mfac"] else f"python {words}"


def _environment(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    took = [f"device {run['device']}"]
    if run.get("ranks"):
        took.append(f"ranks {run['ranks']}{'' if run.get('launcher') else ' (what started them is not recorded)'}")
    if run.get("threads"):
        took.append(f"threads {run['threads']}")
    if run.get("wall_seconds"):
        took.append(f"{run['wall_seconds']:.0f} s")
    if run.get("peak_memory_gib"):
        took.append(f"peak memory {run['peak_memory_gib']:.2f} GiB")
    return plain(f"{versions}; {', '.join(took)}.")
