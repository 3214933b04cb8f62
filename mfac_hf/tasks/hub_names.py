"""Names that the tasks' data sets have on the Hub; importing this loads nothing else."""

__all__ = ["GLUE", "SQUAD", "VISION"]

GLUE = "nyu-mll/glue"
SQUAD = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
VISION = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
