"""Graph passes on traced models, with stated pre- and postconditions.

They own the form of the graphs after tracing. They know neither transformers nor files.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from balcony_export.graph.ir_tools import initializer, replace_node

SCOPES = "pkg.torch.onnx.name_scopes"
#: Name of an attribute, later a note, of ``Attention``: the number of keys that a row sees, its own included.
WINDOW = "window"


def name_weights(model: ir.Model, prefix: str = "") -> None:
    """Give every traced weight the dotted name of its module.

    Precondition: the nodes have the tracer's name scopes. Postcondition: a weight that a node of module ``a.b`` uses is
    called ``<prefix>a.b.weight`` (``.bias`` for vectors); names stay unique. Folded constants lose the tracer's numbers. A
    weight that the tracer folded twice, because a module is entered twice, becomes one value.
    """
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        for value in node.inputs:
            if value is None or value.const_value is None or value.name not in model.graph.initializers:
                continue
            if node.op_type in ("MatMul", "Add") and len(scopes) >= 2 and "." in scopes[-2]:
                wanted = f"{prefix}{scopes[-2]}.{'weight' if node.op_type == 'MatMul' else 'bias'}"
            elif node.op_type == "RMSNormalization" and len(scopes) >= 2:
                wanted = f"{prefix}{scopes[-2]}.weight"
            elif prefix and not (value.name or "").startswith((prefix, "rope_")):
                wanted = f"{prefix}{value.name}"
            else:
                continue
            if value.name != wanted and wanted not in model.graph.initializers:
                value.name = wanted
            elif value.name != wanted and _same(value, model.graph.initializers[wanted]):
                ir.convenience.replace_all_uses_with(value, model.graph.initializers[wanted])
    common.RemoveUnusedNodesPass()(model)


def _same(one: ir.Value, other: ir.Value) -> bool:
    """Whether two constants hold the same numbers."""
    if one.const_value is None or other.const_value is None or one.shape != other.shape:
        return False
    return bool((one.const_value.numpy() == other.const_value.numpy()).all())


def plain_products(model: ir.Model) -> None:
    """Turn every ``Gemm`` with a transposed weight and no bias into the ``MatMul`` that the tracer writes for three axes.

    Modules of a mixture of experts see rows without a batch axis, for which the tracer writes ``Gemm``. Large weights that a
    layer reads twice keep a ``Transpose``: the tracer folds it for a single reader only. Postcondition: weights of layers are
    operands of ``MatMul``, (K, N).
    """

    def transposed(weight: ir.Value) -> ir.Value:
        assert weight.const_value is not None
        return initializer(model, f"{weight.name}.transposed", weight.const_value.numpy().T)

    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.const_value is not None and list(node.attributes["perm"].as_ints()) == [1, 0]:
            ir.convenience.replace_all_uses_with(node.outputs[0], transposed(weight))
            continue
        weight = node.inputs[1] if node.op_type == "Gemm" and len(node.inputs) == 2 else None
        if weight is None or weight.const_value is None or "transB" not in node.attributes:
            continue
        product = ir.Node("", "MatMul", [node.inputs[0], transposed(weight)])
        product.metadata_props.update(node.metadata_props)
        replace_node(model, node, [product])
    common.RemoveUnusedNodesPass()(model)


def note_windows(model: ir.Model) -> None:
    """Move the sliding window of each ``Attention`` from the tracer's attribute into the node's metadata (``WINDOW``).

    Postcondition: every node is standard ONNX. The window is only a note for lowering: the mask contains it.
    """
    for node in model.graph:
        if node.op_type == "Attention" and (window := node.attributes.pop(WINDOW, None)) is not None:
            node.metadata_props[WINDOW] = str(window.as_int())


def collapse_reshapes(model: ir.Model) -> None:
    """Remove reshapes that cancel: tracing splits and merges heads around every rotary embedding and attention.

    Precondition: shapes are annotated. Postcondition: no Reshape follows a Reshape or keeps the shape
    of its input; the values of all outputs are unchanged.
    """
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        source = node.inputs[0]
        assert source is not None
        producer = source.producer()
        while producer is not None and producer.op_type == "Reshape":
            source = producer.inputs[0]
            assert source is not None
            producer = source.producer()
        output = node.outputs[0]
        if source.shape is not None and output.shape is not None and source.shape == output.shape:
            if not output.is_graph_output():
                ir.convenience.replace_all_uses_with(output, source)
        else:
            node.replace_input_with(0, source)
    common.RemoveUnusedNodesPass()(model)


def cut(model: ir.Model, name: str, inputs: Sequence[str], outputs: Sequence[str], dims: dict[str, str]) -> ir.Model:
    """The sub-graph between ``inputs`` and ``outputs`` as a model of its own; weights are shared, not copied.

    Args:
        model: The whole graph; it is not changed.
        name: Name of the new graph.
        inputs: Values that become inputs: original inputs or intermediate values.
        outputs: Values that become outputs.
        dims: Input of ``model`` that the part lacks → an input of the part with the same dimensions. The tracer reads each
            symbolic dimension from the first input that has it.
    """
    clone = model.clone()
    values = {value.name: value for value in clone.graph.inputs}
    for value in [value for node in clone.graph for value in node.outputs if value.name in inputs]:
        # an intermediate value becomes an input: a new value replaces it, so that nothing before it is needed
        fresh = ir.Value(name=value.name, type=value.type, shape=value.shape)
        ir.convenience.replace_all_uses_with(value, fresh, replace_graph_outputs=True)
        value.name = f"{value.name}_before_the_cut"
        clone.graph.inputs.append(fresh)
        values[fresh.name] = fresh
    for node in clone.graph:
        if node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].name in dims:
            node.replace_input_with(0, values[dims[node.inputs[0].name]])
    graph = ir.convenience.extract(clone.graph, [values[name] for name in inputs], list(outputs))
    graph.name = name
    part = ir.Model(graph, ir_version=model.ir_version)
    common.RemoveUnusedNodesPass()(part)
    # extraction collects the weights in a set; in the order of their use, two exports are equal byte for byte
    used = [value for node in graph for value in node.inputs if value is not None and value.name in graph.initializers]
    graph.initializers.clear()
    for value in dict.fromkeys(used):
        graph.register_initializer(value)
    return part


def strip_metadata(model: ir.Model) -> None:
    """Remove the tracer's stack traces and scopes, which have paths of the exporting machine."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "balcony-edge", None
