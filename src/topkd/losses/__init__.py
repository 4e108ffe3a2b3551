"""The losses, by the name that recipes use."""

from collections.abc import Mapping
from dataclasses import dataclass

from topkd.losses.ab import ActivationBoundaries, activation_boundaries
from topkd.losses.base import Loss, Source
from topkd.losses.classifier import (
    ClassAttention,
    ReusedClassifier,
    SoftmaxRegression,
    class_attention,
    class_maps,
    last_map,
)
from topkd.losses.crd import Contrastive, contrast
from topkd.losses.ctkd import CurriculumTemperature
from topkd.losses.deit import TokenDistillation, hard_distillation
from topkd.losses.diagrams import PersistentCrossEntropy, Wasserstein, persistent_cross_entropy
from topkd.losses.dkd import (
    DecoupledDistillation,
    NormalizedDistillation,
    decoupled_distillation,
    normalized_distillation,
)
from topkd.losses.factor_transfer import FactorTransfer, factor_transfer
from topkd.losses.fsp import SolutionFlow, flow_matrix
from topkd.losses.logits import (
    CorrelationDistillation,
    CrossEntropy,
    Distillation,
    TransformedTeacherMatching,
    WeightedTransformedTeacherMatching,
    correlation_distillation,
    distillation,
    standardised,
    transformed_teacher_matching,
)
from topkd.losses.maps import (
    AttentionTransfer,
    NeuronSelectivity,
    attention_transfer,
    neuron_selectivity,
)
from topkd.losses.matched import EdgeMatching, RTDLite, Ultrametric
from topkd.losses.mlkd import MultiLevelDistillation, multi_level_distillation
from topkd.losses.ofd import Overhaul, partial_distance
from topkd.losses.regression import (
    FeatureMimicking,
    FitNet,
    VariationalInformation,
    mean_square,
    surprise,
)
from topkd.losses.relations import (
    CorrelationCongruence,
    ProbabilisticTransfer,
    Relational,
    SimilarityPreserving,
    correlation_kernel,
    correlation_products,
    probabilistic_transfer,
    relational_angles,
    relational_distances,
    similarity_preserving,
)
from topkd.losses.reviewkd import Review, hierarchical
from topkd.losses.topkd import TopKD


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue."""

    loss: type[Loss]
    compares: str
    paper: str
    url: str
    cost: str
    """How work grows with n samples, d numbers of each, c classes; with what a loss brings."""
    zero: bool = True
    """Whether it is 0 for a student that equals its teacher."""
    any_width: bool = True
    """Whether student and teacher may differ in their numbers of channels."""


LOSSES: Mapping[str, Entry] = {
    "ce": Entry(
        CrossEntropy,
        "logits with the labels",
        "Szegedy et al., CVPR 2016",
        "https://arxiv.org/abs/1512.00567",
        "n c",
        zero=False,
    ),
    "kd": Entry(
        Distillation,
        "softened predictions",
        "Hinton et al. 2014",
        "https://arxiv.org/abs/1503.02531",
        "n c",
    ),
    "dkd": Entry(
        DecoupledDistillation,
        "softened predictions, the label apart from the rest",
        "Zhao et al., CVPR 2022",
        "https://arxiv.org/abs/2203.08679",
        "n c",
    ),
    "nkd": Entry(
        NormalizedDistillation,
        "predictions, the label apart from the rest",
        "Yang et al., ICCV 2023",
        "https://arxiv.org/abs/2303.13005",
        "n c",
        zero=False,
    ),
    "dist": Entry(
        CorrelationDistillation,
        "predictions up to scale, within images and within classes",
        "Huang et al., NeurIPS 2022",
        "https://arxiv.org/abs/2205.10536",
        "n c",
        zero=False,
    ),
    "ttm": Entry(
        TransformedTeacherMatching,
        "the prediction with a softened one",
        "Zheng & Yang, ICLR 2024",
        "https://arxiv.org/abs/2402.11148",
        "n c",
        zero=False,
    ),
    "wttm": Entry(
        WeightedTransformedTeacherMatching,
        "the prediction with a softened one, doubtful images more",
        "Zheng & Yang, ICLR 2024",
        "https://arxiv.org/abs/2402.11148",
        "n c",
        zero=False,
    ),
    "ctkd": Entry(
        CurriculumTemperature,
        "predictions, softened against the student",
        "Li et al., AAAI 2023",
        "https://arxiv.org/abs/2211.16231",
        "n c, one learnt temperature",
    ),
    "mlkd": Entry(
        MultiLevelDistillation,
        "predictions, and which images and classes go together",
        "Jin et al., CVPR 2023",
        "https://doi.org/10.1109/CVPR52729.2023.02325",
        "n² c + n c²; with two views, twice the images",
    ),
    "deit": Entry(
        TokenDistillation,
        "the logits of the distillation token with the predicted class",
        "Touvron et al., ICML 2021",
        "https://arxiv.org/abs/2012.12877",
        "n c, a student with a distillation token",
        zero=False,
    ),
    "fitnet": Entry(
        FitNet,
        "one feature map, guessed from the student's",
        "Romero et al., ICLR 2015",
        "https://arxiv.org/abs/1412.6550",
        "n d c, one convolution",
        zero=False,
    ),
    "mse": Entry(
        FeatureMimicking,
        "embeddings",
        "Wang et al., TPAMI 2021",
        "https://arxiv.org/abs/2011.01424",
        "n d, one projection where widths differ",
    ),
    "at": Entry(
        AttentionTransfer,
        "where feature maps have their energy",
        "Zagoruyko & Komodakis, ICLR 2017",
        "https://arxiv.org/abs/1612.03928",
        "n d",
    ),
    "nst": Entry(
        NeuronSelectivity,
        "which patterns channels respond to",
        "Huang & Wang 2017",
        "https://arxiv.org/abs/1707.01219",
        "n d k, k the smaller of channels and positions",
    ),
    "vid": Entry(
        VariationalInformation,
        "feature maps, guessed with learnt uncertainty",
        "Ahn et al., CVPR 2019",
        "https://arxiv.org/abs/1904.05835",
        "n d k with k channels, three 1x1 convolutions a stage",
        zero=False,
    ),
    "fsp": Entry(
        SolutionFlow,
        "products of neighbouring feature maps",
        "Yim et al., CVPR 2017",
        "https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html",
        "n d k with k channels, as many in both networks",
        any_width=False,
    ),
    "ab": Entry(
        ActivationBoundaries,
        "which neurons are active",
        "Heo et al., AAAI 2019",
        "https://arxiv.org/abs/1811.03233",
        "n d, one convolution a stage where shapes differ",
        zero=False,
    ),
    "ofd": Entry(
        Overhaul,
        "pre-activations that pass the ReLU",
        "Heo et al., ICCV 2019",
        "https://arxiv.org/abs/1904.01866",
        "n d k with k channels, one 1x1 convolution a stage",
        zero=False,
    ),
    "ft": Entry(
        FactorTransfer,
        "factors of the last feature map",
        "Kim et al., NeurIPS 2018",
        "https://arxiv.org/abs/1802.04977",
        "n d k with k channels, six 3x3 convolutions and an auto-encoder trained before",
        zero=False,
    ),
    "sp": Entry(
        SimilarityPreserving,
        "which images of a batch have like maps",
        "Tung & Mori, ICCV 2019",
        "https://arxiv.org/abs/1907.09682",
        "n² d",
    ),
    "cc": Entry(
        CorrelationCongruence,
        "embeddings, by products or a kernel over pairs of images",
        "Peng et al., ICCV 2019",
        "https://arxiv.org/abs/1904.01802",
        "n d, two projections; as a kernel n² d",
        zero=False,
    ),
    "rkd": Entry(
        Relational,
        "distances and angles within a batch of embeddings",
        "Park et al., CVPR 2019",
        "https://arxiv.org/abs/1904.05068",
        "n³ d, with n³ + n² d numbers of memory",
    ),
    "pkt": Entry(
        ProbabilisticTransfer,
        "which image of a batch would be taken for which",
        "Passalis & Tefas, ECCV 2018",
        "https://arxiv.org/abs/1803.10837",
        "n² d",
    ),
    "crd": Entry(
        Contrastive,
        "each embedding with the other network's of thousands of images",
        "Tian et al., ICLR 2020",
        "https://arxiv.org/abs/1910.10699",
        "128 n N for N training images, two projections, 1 kB an image (51 MB for 50,000)",
        zero=False,
    ),
    "review": Entry(
        Review,
        "all maps and the embedding, deep ones joined to shallow ones",
        "Chen et al., CVPR 2021",
        "https://arxiv.org/abs/2104.09044",
        "n d², two convolutions and a gate for each map",
        zero=False,
    ),
    "srrl": Entry(
        SoftmaxRegression,
        "embeddings, and what the teacher's classifier makes of them",
        "Yang et al., ICLR 2021",
        "https://openreview.net/forum?id=ZzwDy_wiWv",
        "n d², one convolution",
        zero=False,
    ),
    "cat": Entry(
        ClassAttention,
        "where in the last maps each class is seen",
        "Guo et al., CVPR 2023",
        "https://arxiv.org/abs/2304.12777",
        "n c d",
        zero=False,
    ),
    "simkd": Entry(
        ReusedClassifier,
        "last maps, for a student with its teacher's classifier",
        "Chen et al., CVPR 2022",
        "https://arxiv.org/abs/2203.14001",
        "n d, a projector that stays in the student",
    ),
    "topkd": Entry(
        TopKD,
        "persistence of the embeddings",
        "Kim et al., ICML 2024",
        "https://proceedings.mlr.press/v235/kim24aj.html",
        "n² d",
    ),
    "wasserstein": Entry(
        Wasserstein,
        "persistence of the embeddings, bar by bar",
        "Kerber et al. 2017",
        "https://arxiv.org/abs/1606.03357",
        "n² d",
    ),
    "pce": Entry(
        PersistentCrossEntropy,
        "how densely lifetimes of the embeddings lie",
        "Yeom & Jung, manuscript 2026",
        "https://proceedings.mlr.press/v235/kim24aj.html",
        "n² d",
    ),
    "edge_matching": Entry(
        EdgeMatching,
        "lengths of the edges of both spanning trees",
        "Moor et al., ICML 2020",
        "https://arxiv.org/abs/1906.00722",
        "n² d",
    ),
    "rtd_lite": Entry(
        RTDLite,
        "at which lengths the same clusters form",
        "Tulchinskii et al., AISTATS 2025",
        "https://arxiv.org/abs/2503.11910",
        "n² d",
    ),
    "ultrametric": Entry(
        Ultrametric,
        "at which length two images fall into one cluster",
        "Carlsson & Mémoli, JMLR 2010",
        "https://jmlr.org/papers/v11/carlsson10a.html",
        "n² d",
    ),
}
"""Name -> class, what it compares and its paper."""

__all__ = [
    "LOSSES",
    "ActivationBoundaries",
    "AttentionTransfer",
    "ClassAttention",
    "Contrastive",
    "CorrelationCongruence",
    "CorrelationDistillation",
    "CrossEntropy",
    "CurriculumTemperature",
    "DecoupledDistillation",
    "Distillation",
    "EdgeMatching",
    "Entry",
    "FactorTransfer",
    "FeatureMimicking",
    "FitNet",
    "Loss",
    "MultiLevelDistillation",
    "NeuronSelectivity",
    "NormalizedDistillation",
    "Overhaul",
    "PersistentCrossEntropy",
    "ProbabilisticTransfer",
    "RTDLite",
    "Relational",
    "ReusedClassifier",
    "Review",
    "SimilarityPreserving",
    "SoftmaxRegression",
    "SolutionFlow",
    "Source",
    "TokenDistillation",
    "TopKD",
    "TransformedTeacherMatching",
    "Ultrametric",
    "VariationalInformation",
    "Wasserstein",
    "WeightedTransformedTeacherMatching",
    "activation_boundaries",
    "attention_transfer",
    "class_attention",
    "class_maps",
    "contrast",
    "correlation_distillation",
    "correlation_kernel",
    "correlation_products",
    "decoupled_distillation",
    "distillation",
    "factor_transfer",
    "flow_matrix",
    "hard_distillation",
    "hierarchical",
    "last_map",
    "mean_square",
    "multi_level_distillation",
    "neuron_selectivity",
    "normalized_distillation",
    "partial_distance",
    "persistent_cross_entropy",
    "probabilistic_transfer",
    "relational_angles",
    "relational_distances",
    "similarity_preserving",
    "standardised",
    "surprise",
    "transformed_teacher_matching",
]
