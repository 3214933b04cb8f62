"""Names of data sets on the Hub, which tasks load and model cards cite; importing this loads nothing else."""

__all__ = ["GLUE", "SQUAD", "VISION"]

GLUE = "nyu-mll/glue"
SQUAD = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
VISION = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
