"""Turn a checkpoint into a directory for the Hub: ``python scripts/export_vision.py FILE --model NAME --output DIR``.

FILE is what ``train_vision.py`` or ``prune_vision.py`` wrote, or a published checkpoint. DIR gets
``model.safetensors``, ``config.json``, the small ``sparse.safetensors`` and the masks of a pruned model. The model
class's ``from_pretrained`` loads DIR, and ``mfac card`` and ``mfac push`` take it:

    python scripts/export_vision.py experiments/rn20-prune-800.pth --model resnet20 --output outputs/rn20-80
    mfac card --model outputs/rn20-80 --model_class mfac_hf.models.ResNetCifar --results experiments/rn20.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mfac_hf import save_sparse
from mfac_hf.models import MODEL_NAMES, create_model, read_checkpoint
from mfac_hf.training.vision_arguments import masks_of


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="FILE", help=".pth, .pth.tar, .th or .safetensors")
    parser.add_argument("--model", required=True, choices=MODEL_NAMES, help="name of the model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory, made if missing")
    args = parser.parse_args(argv)
    try:
        checkpoint = read_checkpoint(args.checkpoint)
        weights = checkpoint.weights
        classes = [tensor.shape[0] for name, tensor in weights.items() if name in ("fc.weight", "linear.weight")]
        if not classes:
            raise ValueError(f"{args.checkpoint} has no classifier named fc or linear")
        stem = next(iter(weights.values()))
        model = create_model(args.model, num_classes=classes[0], in_channels=stem.shape[1], weights=weights)
        masks = masks_of(checkpoint, model)
        directory = save_sparse(model, args.output).parent
        if masks is not None:
            masks.save(directory)
        print(directory)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
