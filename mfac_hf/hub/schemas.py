"""The forms of the JSON files that cards are made from, for `mfac_hf.schema.check_schema`.

Each names what cards read, and nothing else. Where None is allowed, the value may also be missing.
"""

from __future__ import annotations

from typing import Any, TypedDict

__all__ = ["Facts", "PrunedFile", "ResultsFile", "Run", "VisionLog"]


class _Described(TypedDict, total=False):
    """What it takes to repeat a run (`mfac_hf.machine.describe_run`)."""

    seed: int | None
    command: list[str] | None
    versions: dict[str, str | None] | None
    device: str | None
    threads: int | None
    ranks: int | None
    launcher: str | None
    wall_seconds: float | None
    peak_memory_gib: float | None


class _DatasetName(TypedDict):
    id: str


class _Dataset(_DatasetName, total=False):
    config: str | None
    source: str | None


class _SubStep(TypedDict, total=False):
    damping: float | None


class _ReportOptional(TypedDict, total=False):
    steps: list[_SubStep]


class _Report(_ReportOptional):
    """A `mfac_hf.pruning.PruningReport`."""

    options: dict[str, Any]
    sparsity: float


class _Pruning(TypedDict, total=False):
    reports: list[_Report]


class _Parameters(TypedDict):
    """How many numbers were trained, and how many there are."""

    trainable_parameters: int
    total_parameters: int


class _Results(TypedDict, total=False):
    lora: _Parameters | None
    task: str | None
    evaluated_on: str | list[str]
    pruning: _Pruning | None
    before_pruning: dict[str, Any] | None


class ResultsFile(_Described, total=False):
    """``results.json``."""

    results: _Results
    arguments: dict[str, dict[str, Any]]
    dataset: _Dataset | None
    base_model: str | None
    base_model_is_local: bool
    optimizer: dict[str, Any] | None


class PrunedFile(_Described, total=False):
    """``pruning.json`` of `mfac prune`."""

    model: str
    model_is_local: bool
    task: str
    evaluated_on: str
    data: dict[str, Any]
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    pruning: _Report


class _VisionRow(TypedDict, total=False):
    event: str
    sparsity: float
    accuracy: float
    accuracy_bn: float


class _VisionArguments(TypedDict, total=False):
    dataset: str | None
    checkpoint: str | None
    optim: str | None
    seed: int | None
    sparsities: list[float] | None
    reestimate_bn: str | None


class VisionLog(_Described, total=False):
    """The log of a vision run."""

    arguments: _VisionArguments
    rows: list[_VisionRow]


class _Named(TypedDict):
    name: str


class _Step(TypedDict, total=False):
    sparsity: float


class _Steps(TypedDict):
    options: dict[str, Any]
    steps: list[_Step]


class _RunOptional(TypedDict, total=False):
    threads: int | None
    ranks: int
    launcher: str
    wall_seconds: float | None
    peak_memory_gib: float | None
    base_model_is_local: bool
    not_finite: list[str]
    parameters: _Parameters


class Run(_RunOptional):
    """What `mfac_hf.hub.run_records.read_run` returns."""

    task: str | None
    split: str | None
    metrics: dict[str, float]
    dataset: _Dataset | None
    base_model: str | None
    optimizer: _Named
    training: dict[str, Any]
    pruning: _Steps | None
    dense_metrics: dict[str, float] | None
    seed: int
    command: list[str]
    versions: dict[str, str | None]
    device: str


class _Counts(TypedDict):
    numel: int
    zeros: int


class _Tensor(_Counts):
    name: str
    shape: list[int]
    target: bool


class _Weights(_Counts):
    targets: _Counts
    tensors: list[_Tensor]


_Class = TypedDict("_Class", {"class": str, "library": str, "task": str | None})


class _AdapterOptional(TypedDict, total=False):
    whole: dict[str, int]
    labels: int | None


class _Adapter(_AdapterOptional):
    type: str
    base: str | None
    base_class: str | None
    settings: dict[str, Any]


class _Model(_Class, total=False):
    adapter: _Adapter
    custom_code: bool
    auto_class: str


class _SecondsOptional(TypedDict, total=False):
    sparse: float


class _Seconds(_SecondsOptional):
    dense: float


class _Latency(TypedDict):
    example: str
    seconds: _Seconds
    sparse_layers: int
    calls: int
    hardware: str
    threads: int
    torch: str


class _FactsOptional(TypedDict, total=False):
    base_model: str | None
    caveats: list[str] | None
    license: str | None


class Facts(_FactsOptional):
    """``card.json``: what `mfac_hf.hub.facts.collect` returns."""

    name: str
    model: _Model
    sparse: bool
    weights: _Weights
    files: dict[str, int]
    latency: _Latency | None
    runs: list[Run]
    dense_runs: list[Run]
    mfac_hf: str
