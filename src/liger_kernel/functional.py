"""The native ops by plain names, for people who write models: each is documented where it is defined.

    from liger_kernel.functional import rms_norm, fused_linear_cross_entropy

Every op takes tensors of any strides on any device, is differentiable, and never writes to its inputs.
`liger_kernel.transformers.functional` has the same ops under the names and argument orders of the incumbent.
"""

from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.ops.cross_entropy import cross_entropy
from liger_kernel.ops.dyt import dyt
from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm
from liger_kernel.ops.fused_moe import fused_moe
from liger_kernel.ops.gated_mlp import gated_mlp
from liger_kernel.ops.glu import glu, glu_packed
from liger_kernel.ops.group_norm import group_norm
from liger_kernel.ops.jsd import jsd
from liger_kernel.ops.kl_div import kl_div
from liger_kernel.ops.layer_norm import layer_norm
from liger_kernel.ops.modulated_rms_norm import modulated_rms_norm
from liger_kernel.ops.moe_router import moe_router
from liger_kernel.ops.moe_router.losses import load_balancing_loss, router_z_loss
from liger_kernel.ops.poly_norm import poly_norm
from liger_kernel.ops.relu_squared import relu_squared
from liger_kernel.ops.rms_norm import rms_norm
from liger_kernel.ops.rope import rope
from liger_kernel.ops.softmax import softmax
from liger_kernel.ops.sparsemax import sparsemax
from liger_kernel.ops.tvd import tvd

__all__ = [
    "LabelCount",
    "cross_entropy",
    "dyt",
    "fused_add_rms_norm",
    "fused_linear_cross_entropy",
    "fused_moe",
    "gated_mlp",
    "glu",
    "glu_packed",
    "group_norm",
    "jsd",
    "kl_div",
    "layer_norm",
    "load_balancing_loss",
    "modulated_rms_norm",
    "moe_router",
    "poly_norm",
    "relu_squared",
    "rms_norm",
    "rope",
    "router_z_loss",
    "softmax",
    "sparsemax",
    "tvd",
]
