"""Result files as the scripts write them, shortened."""


def results(**changes):
    """What run_glue.py writes, shortened."""
    record = {
        "results": {"task": "sst2", "eval_accuracy": 0.8125, "eval_loss": 0.4, "evaluated_on": ["validation"]},
        "command": ["scripts/run_glue.py", "--seed", "3"],
        "arguments": {
            "ModelArguments": {"model_name_or_path": "google/bert_uncased_L-2_H-128_A-2"},
            "GlueArguments": {"task_name": "sst2", "dataset_name": "data/glue", "max_seq_length": 128},
            "OptimizerArguments": {"optim_name": "mfac", "num_grads": 256, "damping": 1e-3, "save_window": True},
            "TrainingArguments": {"learning_rate": 3e-3, "optim": "adamw_torch_fused", "max_steps": -1, "fp16": False},
        },
        "seed": 3,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "threads": 1,
        "wall_seconds": 12.5,
        "peak_memory_gib": 0.5,
    }
    return {**record, **changes}


def log(**changes):
    """What prune_vision.py writes, shortened."""
    arguments = {"dataset": "data/cifar10", "optim": "sgd", "lr": 0.005, "momentum": 0.9, "ngrads": 64, "seed": 1}
    arguments |= {"checkpoint": "rn20.pth", "nepochs": 2, "pruner": "mfac", "sparsities": [0.5, 0.8], "nrecomps": 16}
    rows = [
        {"event": "initial", "step": -1, "sparsity": 0.0, "accuracy": 0.9, "accuracy_bn": 0.91},
        {"event": "prune", "step": 0, "sparsity": 0.5, "accuracy": 0.7, "accuracy_bn": 0.8},
        {"event": "epoch", "epoch": 0, "sparsity": 0.5, "accuracy": 0.85},
        {"event": "prune", "step": 1, "sparsity": 0.8, "accuracy": 0.3, "accuracy_bn": 0.6},
    ]
    record = {"arguments": {**arguments, "reestimate_bn": "after"}, "rows": rows, "command": ["prune_vision.py"]}
    return {**record, "versions": {"torch": "2.13.0"}, "device": "cpu", **changes}


def run(seed, accuracy, pruning=None, **changes):
    """The results of one seed."""
    record = results(seed=seed, **changes)
    record["results"] = {**record["results"], "eval_accuracy": accuracy, "pruning": pruning}
    return record


def pruned(**changes):
    """What mfac prune writes, shortened."""
    report = {"options": {"method": "mfac", "num_grads": 64}, "sparsity": 0.8975, "num_grads": 64, "steps": []}
    record = {"model": "user/dense", "model_is_local": False, "task": "sst2", "evaluated_on": "validation"}
    record |= {"metric": "eval_accuracy", "before": {"eval_accuracy": 0.9, "eval_loss": 0.3}}
    record |= {"after": {"eval_accuracy": 0.8, "eval_loss": 0.5}, "pruning": report, "seed": 0}
    record |= {"data": {"dataset": "data/glue", "max_seq_length": 32, "max_train_samples": None}}
    record |= {"command": ["mfac", "prune", "user/dense"], "versions": {"torch": "2"}, "device": "cpu"}
    return {**record, "threads": 1, "wall_seconds": 3.0, "peak_memory_gib": 0.5, **changes}
