"""Make a model smaller in width or in bits, as an ordinary checkpoint that the exits then share.

Owns the two cuts and their order: MLPs keep their most active neurons, and weights become values that int4 blocks hold.
Both change a model and its balconies where they are, and measure the inputs of the layers on calibration text. Balconies learn
from the uncut model afterwards (``balcony-edge train --teacher``), so they also learn to correct the cut.

Low rank is not among the cuts: it is not better than width at equal bytes (docs/variants.md, "Width and depth together"), and
ordinary checkpoints have no form for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from balcony_edge.errors import InputError
from balcony_export.graph.widen import tensor_as
from balcony_export.model.balcony_files import fingerprint, save_balconies
from balcony_export.model.checkpoint import load_model, save_checkpoint
from balcony_export.model.exits import ExitModel
from balcony_export.model.experts import mixture
from balcony_export.output import fresh_directory
from balcony_export.quantize.blocks import Quantizer, Scheme
from balcony_export.quantize.gptq import DAMPING, second_moments
from balcony_export.verify import reference_logits, require_close

#: Directory of the balconies inside a cut checkpoint.
BALCONIES = "balconies"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def narrow(exits: ExitModel, size: int, rows: Sequence[Sequence[int]]) -> None:
    """Keep the ``size`` most active neurons of every MLP, in the backbone and in the balconies.

    A neuron's activity is its mean square on the text times the squared norm of its column of the down projection: what the
    output loses without it. The columns that stay are then fitted by least squares, so that the MLP's outputs on the text
    change least.

    Args:
        exits: The model, in float32, which is changed.
        size: Number of neurons that each MLP keeps.
        rows: Calibration text as tokens.

    Raises:
        InputError: The model has other MLPs, or they are not wider than ``size``.
    """
    mlps = dict(_mlps(exits))
    width = int(exits.model.config.intermediate_size)
    if not 1 <= size < width:
        raise InputError(f"--mlp {size}: the model's MLPs have {width} neurons: give 1 to {width - 1}")
    moments = second_moments(exits, rows)
    for name, mlp in mlps.items():
        moment, down = moments[f"{name}.down_proj.weight"], mlp.down_proj.weight  # (K, K), (D, K)
        order = (moment.diagonal() * down.square().sum(0)).argsort(descending=True)
        kept, lost = order[:size].sort().values, order[size:]
        inner = moment[kept][:, kept]
        inner.diagonal().add_(DAMPING * inner.diagonal().mean() + 1e-12)  # for MLPs that are silent altogether
        change = torch.linalg.solve(inner, moment[kept][:, lost] @ down[:, lost].T).T  # (D, size)
        for projection in ("gate_proj", "up_proj"):
            linear = getattr(mlp, projection)
            linear.weight, linear.out_features = nn.Parameter(linear.weight[kept].clone()), size
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[kept].clone())
        mlp.down_proj.weight, mlp.down_proj.in_features = nn.Parameter(down[:, kept] + change), size
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = size
    exits.model.config.intermediate_size = size


def _mlps(exits: ExitModel) -> Iterator[tuple[str, Any]]:
    """``(name, MLP)`` of every layer and balcony, named as in :func:`second_moments`."""
    layers: dict[str, Any] = {f"layers.{index}.mlp": layer for index, layer in enumerate(exits.parts.layers)}
    with_mlp = {e: balcony for e, balcony in exits.balconies.items() if balcony.kind in ("decoder", "mlp")}
    layers |= {f"balcony_{e}.layer.mlp": balcony.layer for e, balcony in with_mlp.items()}
    for name, layer in layers.items():
        mlp = getattr(layer, "mlp", None)
        if not all(isinstance(getattr(mlp, projection, None), nn.Linear) for projection in _PROJECTIONS):
            raise InputError(
                f"--mlp: {name} of this model type '{exits.model.config.model_type}' does not consist of "
                f"{', '.join(_PROJECTIONS)}: leave --mlp out"
            )
        yield name, mlp


def refuse_other_than_int4(scheme: Scheme) -> None:
    """Refuse a scheme that :func:`round_backbone` does not have."""
    if scheme.bits != 4 or not scheme.symmetric or scheme.positive:
        raise InputError(f"--precision {scheme}: only symmetric int4 is rounded before the training: leave it out")


@torch.no_grad()
def round_backbone(exits: ExitModel, scheme: Scheme, rows: Sequence[Sequence[int]]) -> None:
    """Round the backbone's weights to what int4 blocks hold; an export with the same scheme stores these values exactly.

    The balconies stay as they are: they are to learn on the rounded backbone. A head of 8 bits also stays, since its rounding
    loses nothing that a balcony could correct.

    Args:
        exits: The model, in float32, which is changed.
        scheme: The scheme of the later export.
        rows: Calibration text for GPTQ; without any, weights are rounded to the nearest values.

    Raises:
        InputError: The scheme does not give symmetric blocks of 4 bits, or the model is a mixture of experts.
    """
    refuse_other_than_int4(scheme)
    if mixture(exits.model.config) is not None:
        raise InputError(f"--precision {scheme}: experts are not rounded before the training: leave it out")
    quantizer = Quantizer(scheme, second_moments(exits, rows) if rows else {})
    for name, module in exits.parts.decoder.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("dt_proj"):  # of Mamba: no export rounds its weight
            blocks = quantizer.layer(f"{name}.weight", module.weight.T.numpy())
            module.weight.copy_(torch.from_numpy(blocks.dequantized(module.in_features)))
    if scheme.head_bits == 4:
        parts = exits.parts
        tables = {"lm_head.weight": parts.head.weight}
        if parts.head.weight is not parts.embed.weight:
            tables["embed_tokens.weight"] = parts.embed.weight
        for name, table in tables.items():
            blocks = quantizer.table(name, tensor_as(table, torch.float32))
            table.copy_(torch.from_numpy(blocks.dequantized(table.shape[1])))


def save_cut(exits: ExitModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a cut model as a Hugging Face checkpoint in float32, and its balconies into the directory ``balconies`` in it.

    Raises:
        InputError: The output exists or cannot be written.
        VerificationError: The model that the files give has other logits.
    """
    with fresh_directory(output) as directory:
        save_checkpoint(exits.model, tokenizer, directory)
        if exits.balconies:
            save_balconies(directory / BALCONIES, exits.balconies, fingerprint(exits.model))
        ids = list(range(3, min(67, exits.model.config.vocab_size)))
        want, got = (reference_logits(ExitModel(one), ids) for one in (exits.model, load_model(directory)))
        require_close(got[exits.depth], want[exits.depth], "the written model's logits differ")
