"""Loss formulas as pure functions of tensors."""

from topkd.losses.ab import activation_boundaries
from topkd.losses.cc import correlation_kernel, correlation_products, neighbor_products
from topkd.losses.classifier import class_attention, class_maps, last_map
from topkd.losses.crd import contrast
from topkd.losses.deit import hard_distillation
from topkd.losses.diagrams import persistent_cross_entropy
from topkd.losses.dist import correlation_distillation
from topkd.losses.dkd import decoupled_distillation, normalized_distillation
from topkd.losses.factor_transfer import factor_transfer
from topkd.losses.fsp import fsp_matrix
from topkd.losses.logits import distillation, standardized
from topkd.losses.maps import attention_transfer, neuron_selectivity
from topkd.losses.mlkd import multi_level_distillation
from topkd.losses.ofd import partial_distance
from topkd.losses.regression import gaussian_nll, mean_square
from topkd.losses.relations import (
    probabilistic_transfer,
    relational_angles,
    relational_distances,
    similarity_preserving,
)
from topkd.losses.reviewkd import hierarchical
from topkd.losses.scale import cloud_scale
from topkd.losses.topkd import topological_distillation
from topkd.losses.ttm import transformed_teacher_matching

__all__ = [
    "activation_boundaries",
    "attention_transfer",
    "class_attention",
    "cloud_scale",
    "class_maps",
    "contrast",
    "correlation_distillation",
    "correlation_kernel",
    "correlation_products",
    "decoupled_distillation",
    "distillation",
    "factor_transfer",
    "fsp_matrix",
    "gaussian_nll",
    "hard_distillation",
    "hierarchical",
    "last_map",
    "mean_square",
    "multi_level_distillation",
    "neighbor_products",
    "neuron_selectivity",
    "normalized_distillation",
    "partial_distance",
    "persistent_cross_entropy",
    "probabilistic_transfer",
    "relational_angles",
    "relational_distances",
    "similarity_preserving",
    "standardized",
    "topological_distillation",
    "transformed_teacher_matching",
]
